"""Which weights a bare spec takes."""

import pytest
import torch
from torch import nn

from lingrad.config.explain import explain
from lingrad.config.targets import resolve_model
from lingrad.errors import SpecError


def test_a_layer_tied_to_an_embedding_is_an_output_head_whatever_its_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.inside = nn.Linear(4, 4, bias=False)
            self.unusual = nn.Linear(4, 9, bias=False)
            self.unusual.weight = self.words.weight

    plan = resolve_model(Tied(), "svd(rank=2)")
    assert [target.name for target in plan.targets] == ["inside.weight"]
    assert [name for name, _ in plan.full] == ["words.weight"]


def test_a_model_whose_text_needs_values_is_explained():
    """Layers of I-BERT show values in their text, which there are none of on the meta device."""

    class Shown(nn.Linear):
        def __repr__(self):
            raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    with torch.device("meta"):
        model = nn.Sequential(Shown(8, 8), nn.Linear(8, 4))
    assert "0.weight" in str(explain(model, {"*": "svd(rank=2)"}))
    with pytest.raises(SpecError, match=r"model must be a torch.nn.Module, not \[1\]"):
        explain([1], "svd(rank=2)")
