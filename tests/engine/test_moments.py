"""How a refresh carries the base's moments over into another basis; the formulas are in contract/test_reference.py."""

import pytest
import torch
from torch import nn

import lingrad
from lingrad import optimizers
from lingrad.config.settings import MOVES
from lingrad.errors import DualityError
from lingrad.optimizers.moments import decay_rates, moment_kinds

SPEC = "svd(rank=2, every=3)"


@pytest.mark.parametrize(
    ("base", "options", "group", "rates"),
    [
        ("adamw", {}, {}, {"exp_avg": 0.9, "exp_avg_sq": 0.999}),
        ("adamw", {"betas": (0.8, 0.95)}, {}, {"exp_avg": 0.8, "exp_avg_sq": 0.95}),
        ("adamw", {}, {"betas": (0.5, 0.75), "weight_decay": 0.5, "lr": 3.0}, {"exp_avg": 0.5, "exp_avg_sq": 0.75}),
        ("lion", {}, {}, {"exp_avg": 0.99}),
        ("muon", {}, {}, {"momentum_buffer": 0.95}),
        ("rmsprop", {"alpha": 0.9, "centered": True}, {}, {"square_avg": 0.9, "grad_avg": 0.9}),
        ("sgd", {"momentum": 0.9}, {}, {}),  # a sum
        ("adagrad", {}, {}, {}),
    ],
)
def test_how_fast_means_forget_is_found_by_running_the_base(base, options, group, rates):
    found = optimizers.find(base, {"lr": 1e-2} | options)
    # 1 - 0.999 has 13 of the 16 digits that 1 has
    assert decay_rates(found, moment_kinds(found), group) == pytest.approx(rates, abs=1e-12)


def wrapped(carry, base="adamw", **options):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    return layer, lingrad.wrap(nn.Sequential(layer), SPEC, base, carry=carry, **({"lr": 1e-2} | options))


def trained(carry, base="adamw", steps=8, **options):
    layer, opt = wrapped(carry, base, **options)
    data = torch.randn(steps, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for x in data:
        layer(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return layer.weight.detach(), opt


@pytest.mark.parametrize("base", [{"base": "sgd", "momentum": 0.9}, {"base": "lion"}, {"base": "adagrad"}], ids=str)
def test_without_means_of_both_degrees_transport_is_rotate(base):
    assert torch.equal(trained("transport", **base)[0], trained("rotate", **base)[0])
    assert not torch.equal(trained("transport")[0], trained("rotate")[0])


@pytest.mark.parametrize("carry", ["keep", "reset", "rotate", "transport"])
def test_only_reset_sets_the_count_of_steps_back(carry):
    _, opt = trained(carry)  # refreshed in steps 1, 4 and 7 of 8
    (coords,) = (sub.coords for sub in opt.subspaces)
    assert int(opt.state[coords]["step"]) == (2 if carry == "reset" else 8)


def test_means_of_a_group_forget_as_its_own_betas_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 6, bias=False)).double()
    (first, one), (second, two) = model.named_parameters()
    groups = [{"params": [(first, one)]}, {"params": [(second, two)], "betas": (0.5, 0.75)}]
    opt = lingrad.wrap(groups, "svd(rank=2, every=2)", "adamw", lr=1e-2, carry="transport")
    found = [dict(opt._run.stepper.moments(sub, "transport", opt._run.groups).rates()) for sub in opt.subspaces]
    assert found[0] == pytest.approx({"exp_avg": 0.9, "exp_avg_sq": 0.999}, abs=1e-12)
    assert found[1] == pytest.approx({"exp_avg": 0.5, "exp_avg_sq": 0.75}, abs=1e-12)
    opt.param_groups[0]["betas"] = (0.7, 0.9)  # as a schedule does
    now = opt._run.stepper.moments(opt.subspaces[0], "transport", opt._run.groups).rates()
    assert dict(now) == pytest.approx({"exp_avg": 0.7, "exp_avg_sq": 0.9}, abs=1e-12)


def test_moments_of_zero_gradients_stay_zero():
    """Their weight after one step is 1 - b; what has seen none has no moments."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    opt = lingrad.wrap(nn.Sequential(layer), "random(rank=2, every=1)", "adamw", lr=1e-2, carry="transport")
    for x in (torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)):
        layer(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    (state,) = (opt.state[sub.coords] for sub in opt.subspaces)
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()


class TwoMeans(torch.optim.Optimizer):
    """An optimizer with a fast and a slow mean."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(step=0, fast=torch.zeros_like(param), slow=torch.zeros_like(param), sq=torch.zeros_like(param))
                state["step"] += 1
                state["fast"].lerp_(param.grad, 0.1)
                state["slow"].lerp_(param.grad, 0.01)
                state["sq"].lerp_(param.grad.square(), 0.001)
                param.add_((state["fast"] + state["slow"]) / (state["sq"].sqrt() + 1e-8), alpha=-group["lr"])


class Uncounted(TwoMeans):
    """One with a mean and squares that does not count its steps."""

    @torch.no_grad()
    def step(self):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state.update(mean=torch.zeros_like(param), sq=torch.zeros_like(param))
            state["mean"].lerp_(param.grad, 0.1)
            state["sq"].lerp_(param.grad.square(), 0.001)
            param.add_(state["mean"] / (state["sq"].sqrt() + 1e-8), alpha=-self.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("base", "why"),
    [(TwoMeans, r"it has several means of gradients \(fast, slow\)"), (Uncounted, "it does not count")],
)
def test_squares_that_cannot_be_estimated_are_refused_and_rotate(base, why):
    with pytest.raises(DualityError, match=f"carry='transport' cannot estimate the squares of base '{base.__name__}'.*{why}"):
        wrapped("transport", base)
    assert torch.isfinite(trained("rotate", base)[0]).all()


@pytest.mark.parametrize("carry", MOVES)
def test_moments_kept_in_8_bits_are_carried(carry):
    weight, _ = trained(carry, moments="8bit", min_8bit_size=2)
    exact, _ = trained(carry)
    assert torch.isfinite(weight).all()
    assert float((weight - exact).norm() / exact.norm()) < 0.05  # codes round moments by up to 1/16 of the largest in a block
