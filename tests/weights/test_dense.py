"""Weights stored as plain tensors."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import lingrad
from lingrad.errors import ModeError
from tests.support.runs import MODES, each_mode


def test_a_merge_reaches_a_weight_whose_strides_allow_no_view():
    """A channels_last convolution: its matrix [out, in * 9] is a copy."""
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3)).double().to(memory_format=layout)
        optimizer = lingrad.wrap(model, {"*": "svd(rank=2, every=2)"}, "sgd", lr=0.1)
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        start = model[0].weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert not torch.equal(model[0].weight, start)
        weights.append(model[0].weight.detach().contiguous())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


def trained(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    optimizer = make(model, "*: svd(rank=2, every=3)", "sgd", lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@each_mode
def test_a_parameter_that_was_replaced_is_the_weight_from_then_on(mode):
    model, optimizer = trained(MODES[mode])
    expected = optimizer.weights()["0.weight"].clone()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer.detach()
    assert torch.equal(model[0].weight, expected)
    assert model[0].weight.requires_grad


def test_a_layer_that_was_parametrized_keeps_the_run_attached_until_it_is_not():
    model, optimizer = trained(lingrad.adapt)
    expected = {name: weight.clone() for name, weight in optimizer.weights().items()}
    weight_norm(model[1])
    with pytest.raises(
        ModeError, match=r"the weight of a .*Linear is not a parameter any more .* make it an nn.Parameter again first"
    ):
        optimizer.detach()
    assert optimizer.mode == "adapter"
    remove_parametrizations(model[1], "weight")
    model[1].weight = nn.Parameter(model[1].weight)  # torch leaves a plain tensor where the parameter was frozen
    optimizer.detach()
    assert not any("lingrad" in name for name, _ in model.named_modules())
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, expected[name], rtol=1e-12, atol=1e-12)
