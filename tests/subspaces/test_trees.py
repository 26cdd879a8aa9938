"""The state of a transform as a tree."""

import pytest
import torch

import lingrad
from lingrad.subspaces import trees


@pytest.mark.parametrize(
    "spec", ["svd(rank=2)", "random(rank=2, kind=rows)", "pca(rank=2)", "kron(left=pca(rank=2), right=random(rank=2))"]
)
def test_a_state_moves_to_a_device_whole(spec):
    """Meta stands for another device: every tensor arrives, numbers and structure stay."""
    state = lingrad.config.spec.parse(spec).init((6, 5), seed=0, device=torch.device("cpu"), dtype=torch.float32)
    moved = trees.moved(state, torch.device("meta"))
    flat, there = trees.flatten(state), trees.flatten(moved)
    assert type(moved) is type(state)
    assert flat.keys() == there.keys()
    for key, value in flat.items():
        if isinstance(value, torch.Tensor):
            assert (there[key].device.type, there[key].shape, there[key].dtype) == ("meta", value.shape, value.dtype)
        else:
            assert there[key] == value
