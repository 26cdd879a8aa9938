"""Base optimizers: found by name, used unmodified, refused where the duality would break."""

import functools
import sys

import pytest
import torch
from torch import nn

import lingrad
from lingrad import optimizers
from lingrad.config.settings import MOVES
from lingrad.errors import DependencyError, DualityError, SpecError
from lingrad.optimizers import checks
from lingrad.optimizers.moments import moment_kinds
from tests.support.models import llama, text_batches, train

NAMED = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "muon": torch.optim.Muon,
}


def test_every_name_is_a_stock_class_without_decay_that_reads_only_gradients():
    for name in optimizers.names():
        for lr in (1.0, 1e-3, 1e-5, 1e-7, 1e-2):  # a learning rate says nothing about what an update reads
            base = optimizers.find(name, {"lr": lr}, decay=False)
            checks.check_reads_only_gradients(base)
        optimizer = base.build([nn.Parameter(torch.zeros(2, 2))])
        assert not type(optimizer).__module__.startswith("lingrad")
        if name in NAMED:
            assert type(optimizer) is NAMED[name]
        assert optimizer.param_groups[0].get("weight_decay", 0.0) == 0.0
        assert optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("name", optimizers.names())
def test_every_name_trains(name):
    model = llama(torch.float32)
    optimizer = lingrad.wrap(model, "svd(rank=8, every=7)", name, lr={"lion": 1e-3, "sgd": 1.0}.get(name, 1e-2))
    batches = text_batches(12, seed=2)
    start = train(llama(torch.float32), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), batches[-1:])
    assert train(model, optimizer, batches[-1:] * 12) < start - 0.1


def test_unknown_base():
    with pytest.raises(SpecError) as caught:
        lingrad.wrap(llama(), "svd(rank=4)", "adamv")
    assert str(caught.value) == (
        "unknown base optimizer 'adamv'; did you mean 'adam'? "
        "Known: adafactor, adagrad, adam, adamw, adamw8bit, lion, muon, rmsprop, sgd; or pass an optimizer class or a factory."
    )


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("adamw", {"beta": (0.9, 0.99)}, "base 'adamw' takes no option 'beta'; did you mean 'betas'? It takes: lr, betas, eps"),
        ("sgd", {"momentumm": 0.9}, "base 'sgd' takes no option 'momentumm'; did you mean 'momentum'?"),
        (torch.optim.AdamW, {"weight_deacy": 0.1}, "base 'AdamW' takes no option 'weight_deacy'"),
        ("adamw", {"params": 3}, "base 'adamw' takes no option 'params'"),
        ("AdamW", {}, "unknown base optimizer 'AdamW'; did you mean 'adamw'?"),
        (3, {}, "base must be a name, an optimizer class or a factory, not 3"),
    ],
)
def test_wrong_options(base, options, message):
    with pytest.raises(SpecError) as caught:
        lingrad.wrap(llama(), "svd(rank=4)", base, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compat": "galore", "base": "sgd"},
            "compat='galore' reproduces galore_torch's optimizers; use base='adamw', 'adamw8bit' or 'adafactor', not 'sgd'",
        ),
        ({"lr": -1.0}, "lr must be a number, 0 or more, not -1.0"),
        ({"betas": (0.9,)}, "base 'adamw' refused its options (betas=(0.9,), weight_decay=0.0): tuple index out of range"),
        ({"base": nn.Identity}, "base 'Identity' returned a Identity; expected a torch.optim.Optimizer"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(SpecError) as caught:
        lingrad.wrap(llama(), "svd(rank=4)", **options)
    assert str(caught.value) == message


def test_a_factory_that_takes_any_option_and_refuses_it():
    def factory(params, lr=1e-3, **options):
        return torch.optim.SGD(params, lr=lr, **options)

    with pytest.raises(
        SpecError, match="base 'factory' refused its options .*; 'legder' may be an option of a run; did you mean"
    ):
        lingrad.wrap(llama(), "svd(rank=4)", factory, legder=True)
    with pytest.raises(SpecError, match=r"refused its options \(lr=0.1, momentum=-1.0\): Invalid momentum value: -1.0$"):
        lingrad.wrap(llama(), "svd(rank=4)", factory, lr=0.1, momentum=-1.0)


def test_compat_galore_takes_svd_only():
    with pytest.raises(SpecError, match=r"which has svd with the exact solver only, not power\(rank=4\)"):
        lingrad.wrap(llama(), "power(rank=4)", compat="galore")


@pytest.mark.parametrize(("name", "package", "extra"), [("lion", "lion_pytorch", "lion"), ("adamw8bit", "bitsandbytes", "bnb")])
def test_a_missing_package_names_its_extra(monkeypatch, name, package, extra):
    for module in list(sys.modules):
        if module.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError) as caught:
        lingrad.wrap(llama(), "svd(rank=4)", name)
    assert str(caught.value) == f"base '{name}' needs the package {package}: pip install 'lingrad[{extra}]'"


class Lars(torch.optim.SGD):
    """A trust ratio: the update is scaled by the parameter's norm."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(p.norm() + 1e-3)
        return super().step(closure)


class Anchored(torch.optim.SGD):
    """Remembers where the parameter was, as schedule-free methods do; a merge between steps would throw it off."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("anchor", p.detach().clone())
                p.grad.add_(p.detach() - self.state[p]["anchor"])
        return super().step(closure)


@pytest.mark.parametrize("lr", [0.1, 1e-6])
def test_updates_that_read_the_parameter_are_refused(lr):
    refused = (
        (Lars, {}),
        (Anchored, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.ASGD, {}),
        ("adafactor", {"scale_parameter": True}),
    )
    for base, options in refused:
        options = {"lr": lr, **options}
        with pytest.raises(DualityError, match=r"the update of base '.*' reads the parameter, not only its gradient"):
            lingrad.wrap(llama(), "svd(rank=4)", base, **options)


@pytest.mark.parametrize("decay", [0.5, 1e-2, 1e-4])
@pytest.mark.parametrize("stock", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_decay_inside_a_factory_is_refused(stock, decay):
    def factory(params, lr):
        return stock(params, lr=lr, weight_decay=decay)

    with pytest.raises(DualityError, match="weight decay is the engine's"):
        lingrad.wrap(llama(), "svd(rank=4)", factory, lr=1e-5)


@pytest.mark.parametrize("base", [functools.partial(torch.optim.AdamW, weight_decay=0.3), "function"])
def test_a_decay_that_a_factory_brings_is_not_dropped(base):
    def factory(params, lr=1e-3, weight_decay=0.3):
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)

    with pytest.raises(
        DualityError, match=r"has weight_decay=0.3; .* give it to the engine: lingrad.wrap\(..., weight_decay=...\)"
    ):
        lingrad.wrap(llama(), "svd(rank=4)", factory if base == "function" else base)


@pytest.mark.parametrize("option", ["scale", "carry"])
def test_options_of_transforms_are_refused_where_nothing_is_transformed(option):
    value = {"scale": 0.5, "carry": "reset"}[option]
    with pytest.raises(SpecError, match=f"'{option}' has no effect where nothing is transformed; leave it out"):
        lingrad.wrap(llama(), {"*": "none"}, **{option: value})
    lingrad.wrap(llama(), {"*": "none"})


def test_a_base_that_needs_a_closure_is_refused():
    with pytest.raises(
        SpecError, match=r"base 'LBFGS' cannot be used: its step\(\), without a closure, failed with: .*closure"
    ):
        lingrad.wrap(llama(), "svd(rank=4)", torch.optim.LBFGS)


def test_classes_and_factories():
    def factory(params, lr):
        return torch.optim.NAdam(params, lr=lr)

    for base in (torch.optim.RAdam, factory):
        optimizer = lingrad.wrap(llama(), "svd(rank=4)", base, lr=1e-3)
        train_once(optimizer)
        assert type(optimizer.base) in (torch.optim.RAdam, torch.optim.NAdam)


def train_once(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def test_stock_adamw_is_fused_unless_told_otherwise():
    assert not optimizers.find("sgd", {"lr": 0.1}).build([nn.Parameter(torch.zeros(2))]).param_groups[0]["fused"]
    assert optimizers.find("adamw", {}).build([nn.Parameter(torch.zeros(2))]).param_groups[0]["fused"] is True
    assert not optimizers.find("adamw", {"foreach": True}).build([nn.Parameter(torch.zeros(2))]).param_groups[0]["fused"]
    assert not optimizers.find("adamw", {"fused": False}).build([nn.Parameter(torch.zeros(2))]).param_groups[0]["fused"]


def test_a_class_derived_from_adam_is_fused_only_if_it_takes_that():
    class Plain(torch.optim.Adam):
        def __init__(self, params, lr=1e-3):
            super().__init__(params, lr=lr)

    class Open(torch.optim.Adam):
        def __init__(self, params, **options):
            super().__init__(params, **options)

    for base, fused in ((Plain, None), (Open, True)):
        optimizer = lingrad.wrap(llama(), "svd(rank=4)", base, lr=1e-3)
        train_once(optimizer)
        assert optimizer.base.param_groups[0]["fused"] is fused


def test_muon_steps_matrices_and_adamw_the_rest():
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4)", "muon", lr=1e-3, betas=(0.8, 0.9), ns_steps=4)
    train_once(optimizer)
    assert [group.get("betas") for group in optimizer.param_groups] == [None, (0.8, 0.9), (0.8, 0.9)]
    assert [group.get("ns_steps") for group in optimizer.param_groups] == [4, None, None]
    built = optimizer._run.stepper.built(optimizer.param_groups)
    kinds = {type(one.optimizer): [own["name"] for own, _ in one.pairs] for one in built}
    assert kinds == {torch.optim.Muon: ["coords"], torch.optim.AdamW: ["matrices", "vectors"]}


@pytest.mark.parametrize(
    ("base", "options", "degrees"),
    [
        ("adamw", {}, {"exp_avg": 1, "exp_avg_sq": 2}),
        ("adamw", {"amsgrad": True}, {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}),
        ("sgd", {"momentum": 0.9}, {"momentum_buffer": 1}),
        ("sgd", {}, {}),
        ("lion", {}, {"exp_avg": 1}),
        ("rmsprop", {"centered": True}, {"square_avg": 2, "grad_avg": 1}),
        ("adagrad", {}, {"sum": 2}),
        ("muon", {}, {"momentum_buffer": 1}),
    ],
)
def test_moments_are_told_apart_by_how_they_grow(base, options, degrees):
    assert moment_kinds(optimizers.find(base, options)).degrees == degrees


@pytest.mark.parametrize(
    ("base", "state"), [("adafactor", "exp_avg_sq_row"), ("adamw8bit", "state1"), (torch.optim.Adamax, "exp_inf")]
)
@pytest.mark.parametrize("carry", MOVES)
def test_states_that_cannot_be_carried_are_refused_at_once(base, state, carry):
    with pytest.raises(DualityError, match=f"cannot {carry} the state '{state}' of base '{optimizers.base.name_of(base)}'"):
        lingrad.wrap(llama(), "svd(rank=4)", base, carry=carry)
