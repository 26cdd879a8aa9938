"""Writes into the W of a sum that are found afterwards."""

import copy

import pytest
import torch
from torch import nn

from lingrad.errors import ModeError
from tests.adapters.test_reading import IDS, trained
from tests.support.runs import each_mode

SILENT = {
    "list": lambda ws: torch._foreach_mul_(ws, 0.5),
    "average": lambda ws: torch._foreach_lerp_(ws, [torch.ones_like(w) for w in ws], 0.5),
    "copies": lambda ws: torch._foreach_copy_(ws, [w * 0.5 for w in ws]),
    "vector": lambda ws: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(ws) * 0.5, ws),
    "out": lambda ws: [torch.mul(w, 0.5, out=w) for w in ws],
    "function": lambda ws: [torch.relu_(w) for w in ws],
    "detached": lambda ws: [w.detach().mul_(0.5) for w in ws],
    "view": lambda ws: [w.view(-1).mul_(0.5) for w in ws],
    "row": lambda ws: [w[0].mul_(0.5) for w in ws],
    "memory": lambda ws: [w.set_(w.detach() * 0.5) for w in ws],
    "other data": lambda ws: [setattr(w, "data", w.detach() * 0.5) for w in ws],
}


@pytest.mark.parametrize("writer", SILENT)
@each_mode
def test_a_write_that_is_found_afterwards_is_the_weight_or_an_error_until_a_state_is_loaded(mode, writer):
    model, optimizer = trained(mode)
    before = {name: weight.detach().clone() for name, weight in optimizer.weights().items()}
    expected = [before[sub.name].clone() for sub in optimizer.subspaces]
    with torch.no_grad():
        SILENT[writer](expected)
        SILENT[writer]([sub.weight.param for sub in optimizer.subspaces])
    if mode == "optimizer":
        now = optimizer.weights()
        assert all(torch.equal(now[sub.name], weight) for sub, weight in zip(optimizer.subspaces, expected, strict=True))
        return
    coords = [sub.coords.clone() for sub in optimizer.subspaces]
    readers = (lambda: model(IDS), optimizer.step, optimizer.weights, model.state_dict, optimizer.detach)
    for use in (*readers, lambda: model.linear.weight + 0, lambda: optimizer.switch("optimizer")):
        with pytest.raises(ModeError, match=r"written into .* by a function that does not say so.*layer.weight.copy_"):
            use()
    assert all(torch.equal(sub.coords, was) for sub, was in zip(optimizer.subspaces, coords, strict=True))
    model.load_state_dict(before)
    now = optimizer.weights()
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    model(IDS).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"merge_every": 3}, {"layerwise": True}])
def test_what_a_run_writes_itself_is_no_other_program_s(options):
    model, optimizer = trained("adapter", weight_decay=0.1, **options)
    for _ in range(5):  # with a refresh
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for mode in ("optimizer", "adapter"):
        optimizer.switch(mode)
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
        model(IDS)
    weights = [sub.weight.param for sub in optimizer.subspaces]
    assert all(weight.known == weight._version for weight in weights)
