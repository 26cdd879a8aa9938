"""A run in both modes, the models it is tried on, and what of two runs is compared."""

import io

import pytest
import torch

import lingrad
from tests.support.models import llama, text_batches, text_loss, zoo, zoo_batches, zoo_loss

MODES = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}

each_mode = pytest.mark.parametrize("mode", MODES)

EVERY_KIND = {"*": "svd(rank=3, every=3)"}

LINEAR = "svd(rank=4, every=3)"

MODELS = {"llama": (llama, LINEAR, text_batches, text_loss), "every kind": (zoo, EVERY_KIND, zoo_batches, zoo_loss)}

each_model = pytest.mark.parametrize("kind", MODELS)


def weights_of(optimizer):
    return {name: weight.detach().to("cpu", copy=True) for name, weight in optimizer.weights().items()}


def assert_equal_bits(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value.cpu(), b[name].cpu()), name


def assert_same(a, b, path=""):
    """Equal to the bit, in the same dtypes, whatever it is."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key, value in a.items():
            assert_same(value, b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}/{i}")
    else:
        assert a == b, path


def through_a_file(state, device=None):
    """Saved and loaded, with the tensors on a device; None leaves them on the one they were saved from."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, map_location=device)
