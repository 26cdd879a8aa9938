"""scale="norm": a step in the coordinates moves a weight as far as a full step of the base would."""

import pytest
import torch
from torch import nn

import lingrad
from lingrad import optimizers
from lingrad.errors import CheckpointError, SpecError
from tests.support.models import gap, llama, text_batches, three_ways, train
from tests.support.runs import MODES

pytestmark = pytest.mark.thinned(3)

GROW = ("sgd",)


def stepped(rules, base, shape, **options):
    """The length of the first step of a weight, whose gradient is random with the same entries throughout."""
    torch.manual_seed(0)
    m, n = shape
    model = nn.Linear(n, m, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = lingrad.wrap(model, {"*": rules}, base, lr=1e-3, **options)
    x = torch.randn(2 * n, n, dtype=torch.float64)
    (model(x) * torch.randn(2 * n, m, dtype=torch.float64)).sum().backward()
    optimizer.step()
    return float((model.weight - before).detach().norm()), optimizer


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64, 64)], ids=str)
@pytest.mark.parametrize("side", ["short", "long", "both"])
@pytest.mark.parametrize("base", ["adamw", "lion", "muon", "adagrad", "rmsprop"])
def test_a_step_is_as_long_as_a_full_one(base, side, shape):
    full, _ = stepped("full()", base, shape, scale="norm")
    ours, optimizer = stepped(f"random(rank=6, kind=orthonormal, side={side})", base, shape, scale="norm")
    # each coordinate moves by the rate exactly at Adam's first step; Muon's iteration leaves singular values of 0.7 to 1.2
    assert ours == pytest.approx(full, rel=0.3 if base == "muon" else 1e-3)
    (group,) = (group for group in optimizer.param_groups if group["kind"] == "coords")
    p, q = optimizer.subspaces[0].coords.shape
    assert group["scale"] == pytest.approx((shape[0] * shape[1] / (p * q)) ** 0.5)


@pytest.mark.parametrize("base", optimizers.names())
def test_steps_that_grow_with_the_gradient_are_projections_already(base):
    options = {"min_8bit_size": 16} if base == "adamw8bit" else {}
    optimizer = lingrad.wrap(llama(torch.float32), "svd(rank=4)", base, lr=1e-3, scale="norm", **options)
    scales = {group["scale"] for group in optimizer.param_groups if group["kind"] == "coords"}
    assert scales == {1.0} if base in GROW else 1.0 not in scales


@pytest.mark.parametrize("mode", MODES)
def test_each_factor_is_a_group_and_the_run_is_that_of_numbers(mode):
    rules = {"*mlp*": "svd(rank=4, every=3)", "*": "svd(rank=2, every=3)"}
    model, twin = llama(), llama()
    optimizer = MODES[mode](model, rules, lr=1e-2, scale="norm", weight_decay=0.1)
    groups = [group for group in optimizer.param_groups if group["kind"] == "coords"]
    assert len({group["name"] for group in groups}) == len(groups) > 1
    named = dict(twin.named_parameters())
    given = [
        {"params": [(name, named[name])], "rules": {"*": spec}, "scale": group["scale"]}
        for group in groups
        for name, spec in zip(group["param_names"], group["specs"], strict=True)
    ]
    seen = {name for group in groups for name in group["param_names"]}
    given.append({"params": [(name, param) for name, param in named.items() if name not in seen], "rules": {"*": "none"}})
    other = lingrad.wrap(given, {"*": "none"}, lr=1e-2, weight_decay=0.1)
    batches = text_batches(7)
    for one, run in ((model, optimizer), (twin, other)):
        train(one, run, batches)
    assert gap(optimizer.weights(), other.weights()) <= 1e-12


def test_the_modes_agree_and_switches_keep_it():
    wrapped, adapted, switched = three_ways(
        llama, "svd(rank=4, every=3)", "adamw", text_batches(8), lr=1e-2, scale="norm", weight_decay=0.1
    )
    assert max(gap(adapted, wrapped), gap(switched, wrapped)) <= 1e-12


@pytest.mark.parametrize("value", ["auto", -1.0, float("nan"), None])
def test_what_it_may_be(value):
    with pytest.raises(SpecError, match="scale must be a number, 0 or more"):
        lingrad.wrap(llama(), "svd(rank=4)", lr=1e-3, scale=value)


def test_a_checkpoint_of_the_other_kind_says_what_differs():
    rules = {"*mlp*": "svd(rank=4)", "*": "svd(rank=2)"}
    norms, number = (lingrad.wrap(llama(), rules, lr=1e-2, scale=scale) for scale in ("norm", 1.0))
    for one, other in ((norms, number), (number, norms)):
        with pytest.raises(CheckpointError, match=r"param groups and this run \d; scale='norm' makes one for each factor"):
            one.load_state_dict(other.state_dict())
