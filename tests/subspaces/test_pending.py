"""The gradient that a refresh waits for: what backward left, what others did to it before the step, and what is dropped."""

import io

import pytest
import torch
from torch import nn

from lingrad.errors import ModeError
from tests.support.models import gap
from tests.support.runs import MODES, each_mode


@each_mode
def test_a_gradient_made_finite_by_hand_keeps_the_basis_and_steps(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    basis = sub.map().tensors[0].clone()
    (model(torch.ones(5, 8, dtype=torch.float64)).sum() * float("inf")).backward()
    sub.coords.grad.nan_to_num_(0.0, 1.0, -1.0)
    with pytest.warns(RuntimeWarning, match="not finite; the old basis stays"):
        optimizer.step()
    assert torch.equal(sub.map().tensors[0], basis)


@each_mode
def test_zeroed_gradients_of_a_weight_that_a_refresh_step_does_not_reach(mode):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)]).double()
    optimizer = MODES[mode](model, "svd(rank=2, every=2)", "sgd", lr=0.1)
    x = torch.ones(5, 8, dtype=torch.float64)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        sum(layer(x).square().sum() for layer in (model if step < 2 else model[:1])).backward()
        optimizer.step()
    assert [sub.basis.refreshes for sub in optimizer.subspaces] == [2, 1]


@each_mode
@pytest.mark.parametrize("how", ["model", "clip"])
def test_a_gradient_that_was_dropped_refreshes_nothing(mode, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    model(torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
    if how == "clip":
        optimizer.clip_grad_norm_(1.0)
        optimizer.zero_grad()
    else:
        model.zero_grad()
    optimizer.step()
    assert sub.basis.refreshes == 0
    assert sub.coords.grad is None


@each_mode
@pytest.mark.parametrize("spec", ["svd(rank=6, every=2)", "random(rank=6, every=2, kind=orthonormal)"])
def test_gradients_are_not_kept_over_a_refresh(mode, spec):
    """Coordinates of an old basis say nothing in the new one; who zeroes no gradient is told."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = MODES[mode](model, spec, "sgd", lr=1e-3)
    x = torch.ones(5, 8, dtype=torch.float64)
    message = "the gradient of 0.weight is from before its basis was refreshed; call zero_grad"
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    with pytest.raises(ModeError, match=message):
        model(x).square().sum().backward()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    model(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(ModeError, match=f"{message}|did not come from a backward since the last step"):
        optimizer.step()


@each_mode
def test_gradients_kept_over_steps_between_refreshes_are_those_of_torch(mode):
    weights = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        optimizer = MODES[mode](model, "svd(rank=6, every=0)", "sgd", lr=1e-3) if wrapped else sgd
        for seed in range(5):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            model(x).square().sum().backward()
            optimizer.step()
        weights.append(optimizer.weights() if wrapped else dict(model.named_parameters()))
    assert gap(*weights) <= 1e-12


@each_mode
def test_micro_batches_whose_gradient_is_one_number_expanded(mode):
    """The gradient of a sum has one entry in memory; what is added to it must go elsewhere."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))

    model = Table()
    optimizer = MODES[mode](model, {"*": "svd(rank=2)"}, "sgd", lr=0.1)
    for _ in range(2):
        model.table.sum().backward()
    assert torch.equal(optimizer.subspaces[0].pending.total.dense(), torch.full((4, 3), 2.0, dtype=torch.float64))


@each_mode
def test_a_model_is_saved_between_backward_and_step(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = MODES[mode](model, "svd(rank=2)", lr=0.1)
    x = torch.ones(5, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    optimizer.step()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not torch.equal(loaded(x), model(x))  # the weights before the step
    torch.manual_seed(0)
    assert torch.equal(loaded(x), nn.Sequential(nn.Linear(8, 6, bias=False)).double()(x))
