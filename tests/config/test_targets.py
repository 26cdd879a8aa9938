"""Which weights a bare spec takes."""

from torch import nn

from lingrad.config.targets import resolve_model


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
