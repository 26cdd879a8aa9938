"""What whoever calls a wrapped layer sees of it is what he sees of the plain one."""

import copy

import pytest
import torch
from torch import nn

from tests.support.runs import MODES, each_mode

pytestmark = pytest.mark.thinned(3)

# In float64 the layer's sums in another order: some thousand roundings of 1e-16.
EXACT = 1e-12

SHAPES = [(0, 8), (8,), (5, 8), (0, 3, 8), (2, 0, 8), (2, 3, 8), (2, 1, 3, 8), (1, 1, 1, 1, 8)]


def layers(kind, mode, bias):
    torch.manual_seed(0)
    plain = nn.Linear(8, 6, bias=bias).double()
    if kind == "conv1d":
        pytest.importorskip("transformers")
        from transformers.pytorch_utils import Conv1D

        plain = Conv1D(6, 8).double()
        if not bias:
            plain.bias.data.zero_()
    wrapped = copy.deepcopy(plain)
    model = nn.Sequential(wrapped)
    optimizer = MODES[mode](model, {"*.weight": f"svd(rank=2, every=4, side={SIDES[kind]})"}, lr=1e-2)
    for _ in range(2):  # coordinates that are not zero
        optimizer.zero_grad()
        model(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    plain.load_state_dict({name.removeprefix("0."): value for name, value in optimizer.weights().items()})
    optimizer.zero_grad()
    return plain, wrapped


SIDES = {"linear": "right", "left": "left", "both": "both", "conv1d": "right"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", SIDES)
@each_mode
def test_a_layer_is_called_as_a_plain_one(mode, kind, bias, shape):
    results = []
    for layer in layers(kind, mode, bias):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        out = layer(x)
        seen = out.shape, out.stride(), out.is_contiguous(), out._is_view() and out._base is x, out.dtype, out.requires_grad
        changed = out.mul_(2.0)  # an operation in place, as nn.ReLU(inplace=True) does
        changed.square().sum().backward()
        results.append((seen, changed.detach(), x.grad))
    (seen, out, grad), (seen_plain, out_plain, grad_plain) = results[1], results[0]
    assert seen == seen_plain
    torch.testing.assert_close(out, out_plain, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(grad, grad_plain, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("given", ["transposed", "expanded", "strided", "no gradient", "inference"])
@pytest.mark.parametrize("kind", SIDES)
@each_mode
def test_inputs_in_any_memory_are_taken(mode, kind, given):
    made = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = made.permute(2, 1, 0).contiguous()
    if given in ("transposed", "expanded", "strided"):
        x = {"transposed": made.permute(1, 2, 0), "expanded": made[:, 0, 0].expand(4, 8), "strided": x[:, ::2]}[given]
    results = []
    if kind == "conv1d" and given == "strided":
        x = x.contiguous()  # transformers' own layer takes no other
    for layer in layers(kind, mode, bias=True):
        with torch.inference_mode(given == "inference"):
            held = x.clone() if given == "inference" else x.detach().requires_grad_(given != "no gradient")
            out = layer(held)
        if given != "inference":
            out.square().sum().backward()
        results.append((out.shape, out.is_inference(), out.detach().clone(), held.grad))
    assert results[0][:2] == results[1][:2]
    torch.testing.assert_close(results[1][2], results[0][2], rtol=EXACT, atol=EXACT)
    assert (results[0][3] is None) == (results[1][3] is None)
    if results[0][3] is not None:
        torch.testing.assert_close(results[1][3], results[0][3], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [0, 1, 4], ids=["refresh", "step", "second refresh"])
@pytest.mark.parametrize("rules", ["svd(rank=2, every=4)", "power(rank=2, every=4)", "random(rank=2, every=4)", "pca(rank=2)"])
def test_experts_without_tokens_train_like_the_plain_layer(mode, step, rules):
    """A batch without tokens gives a gradient of zeros, in a refresh too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    optimizer = MODES[mode](model, rules, lr=1e-2)
    for i in range(6):
        optimizer.zero_grad()
        model(torch.randn(0 if i == step else 5, 8, dtype=torch.float64)).square().sum().backward()
        if i == step:
            assert all(not sub.coords.grad.any() for sub in optimizer.subspaces)
        optimizer.step()
    assert all(torch.isfinite(value).all() for value in optimizer.weights().values())
