"""Weights that are moved, tied, replaced or parametrized in mid-run: as in plain torch, or an error in words."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lingrad
from lingrad.errors import ModeError
from tests.support.runs import MODES, each_mode
from tests.support.small import repeat


def exchange(one, other):
    one.weight, other.weight = other.weight, one.weight


def share(one, other):
    other.weight = one.weight


def share_past_the_module(one, other):
    other._parameters["weight"] = one._parameters["weight"]


@each_mode
@pytest.mark.parametrize("make", [exchange, share, share_past_the_module])
def test_layers_that_exchange_or_share_their_weights_are_named(mode, make):
    """Plain torch steps the parameter once, with its own moments; each layer's would be added up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    optimizer = MODES[mode](model, {"*.weight": "svd(rank=2, every=3)"}, lr=1e-2)
    x = torch.randn(4, 8, dtype=torch.float64)
    repeat(model, optimizer, 2, x)

    def step_after(change):
        change(model[0], model[2])
        repeat(model, optimizer, 1, x)

    with pytest.raises(
        ModeError, match=r"[02]\.weight (holds the parameter of another layer|is put into a module).*[Cc]all detach\(\)"
    ):
        step_after(make)


PUT = {
    "register_parameter": lambda layer, weight: layer.register_parameter("weight", weight),
    "dict": lambda layer, weight: layer._parameters.__setitem__("weight", weight),
    "attribute": lambda layer, weight: setattr(layer, "weight", weight),
}


@each_mode
@pytest.mark.parametrize("put", PUT)
def test_a_parameter_is_the_whole_weight_however_it_is_put_there(mode, put):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    optimizer = MODES[mode](model, {"*.weight": "svd(rank=2, every=3)"}, lr=1e-2)
    x = torch.randn(4, 8, dtype=torch.float64)
    repeat(model, optimizer, 2, x)
    fresh = torch.randn(8, 8, dtype=torch.float64)
    PUT[put](model[0], nn.Parameter(fresh.clone()))
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, fresh, model[0].bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.weights()["0.weight"], fresh, rtol=0, atol=0)
    repeat(model, optimizer, 2, x)
    assert not torch.equal(optimizer.weights()["0.weight"], fresh)


class TiedHead(nn.Module):
    """An embedding and a head of one weight, as language models have."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.inner = nn.Linear(8, 8)
        self.tie_weights()

    def tie_weights(self):
        self.head.weight = self.get_parameter("embed.weight")

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embed(ids))))


@each_mode
def test_to_tie_again_what_is_tied_changes_nothing(mode):
    """``resize_token_embeddings`` of transformers calls ``tie_weights()`` even where the size stays."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = TiedHead().double()
        optimizer = MODES[mode](model, {"*.weight": "svd(rank=2, every=3)"}, lr=1e-2)
        for _ in range(4):
            repeat(model, optimizer)
            if again:
                model.tie_weights()
                model.inner.weight = model.inner.weight
        found.append(optimizer.weights())
        optimizer.detach()
        assert model.head.weight is model.embed.weight
        assert type(model.embed) is nn.Embedding
    assert all(torch.equal(found[1][name], weight) for name, weight in found[0].items())


def test_another_weight_for_a_parametrized_layer_is_refused_and_the_run_goes_on():
    model = TiedHead().double()
    optimizer = lingrad.adapt(model, {"*.weight": "svd(rank=2, every=3)"}, lr=1e-2)
    repeat(model, optimizer)
    with pytest.raises(ModeError, match=r"embed\.weight is replaced by another tensor.*call detach\(\)"):
        model.head.weight = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64))
    repeat(model, optimizer)
    optimizer.detach()
    assert model.head.weight is model.embed.weight


LATER = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 2),
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "weight_norm": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("change", LATER)
def test_a_parametrization_put_on_in_adapter_mode_is_refused_and_the_run_goes_on(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    optimizer = lingrad.adapt(model, {"*.weight": "svd(rank=2, every=3)"}, lr=1e-2)
    x = torch.randn(4, 8, dtype=torch.float64)
    repeat(model, optimizer, 2, x)
    weight = optimizer.weights()["0.weight"].clone()
    with pytest.raises(ModeError, match=r"0\.weight is .*call detach\(\)"):
        LATER[change](model[0])
    assert torch.equal(optimizer.weights()["0.weight"], weight)
    repeat(model, optimizer, 2, x)
    optimizer.detach()
    LATER[change](model[0])
