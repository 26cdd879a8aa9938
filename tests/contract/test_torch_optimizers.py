"""The contract of torch.optim: every optimizer of torch as a base, on the inputs of torch's own tests, against itself alone.

With the transform `full` the coordinates have the shape of the weight and the map is the identity, so that a run steps as its
base would step the model's parameters. Whatever a caller can do to an optimizer is done to both.
"""

import copy
import itertools
import pickle
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import optimizer as torch_optimizer

import lingrad
from lingrad.errors import DualityError, ModeError, SpecError
from tests.support.models import gap
from tests.support.runs import MODES, assert_equal_bits, each_mode, through_a_file
from tests.support.torch_inputs import OPTIMIZERS

pytestmark = [pytest.mark.thinned(6), pytest.mark.rare(9)]

# In float64 two runs of the same mathematics part by rounding, 1e-16 a step; RMS-normed steps divide by a root of squares.
TOLERANCE = 1e-12
# Muon orthogonalises in bfloat16, where a rounding of the gradient may move an entry by a unit in the last place, 2**-8 of a
# step of about lr=1e-2 or less.
MUON = 2**-8 * 1e-2 * 10

REFUSED = {
    "Adafactor": (DualityError, "reads the parameter"),  # its step is as long as the parameter
    "ASGD": (DualityError, "reads the parameter"),  # it shrinks the parameter by lambd
    "LBFGS": (SpecError, "closure"),
    "SparseAdam": (SpecError, "dense gradients"),
}


def cases(chosen):
    """Every optimizer with every of its options; the first of each, and what its learning rate may be, by default."""
    found = []
    for info in OPTIMIZERS:
        for i, given in enumerate(info.optim_inputs_func("cpu")):
            name = info.optim_cls.__name__
            default = i == 0 or isinstance(given.kwargs.get("lr"), torch.Tensor)
            if chosen(name):
                marks = () if default else pytest.mark.slow
                found.append(pytest.param(info.optim_cls, given.kwargs, id=f"{name}-{i}", marks=marks))
    return pytest.mark.parametrize(("optimizer_class", "options"), found)


each_accepted = cases(lambda name: name not in REFUSED)

slow = pytest.mark.slow

each_kind = pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        pytest.param(
            info.optim_cls,
            {kind: True, **lr},
            id=f"{info.optim_cls.__name__}-{kind}{'-lr' if lr else ''}",
            marks=slow if lr else (),
        )
        for info in OPTIMIZERS
        for kind in (*info.supported_impls, *(["capturable"] if info.has_capturable_arg else []))
        for lr in ({}, {"lr": torch.tensor(1e-3)})
        if info.optim_cls.__name__ not in REFUSED
    ],
)


def model_for(optimizer_class):
    torch.manual_seed(0)
    bias = optimizer_class is not torch.optim.Muon
    return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 6, bias=bias)).double()


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    loss = model(torch.randn(4, 5, generator=generator).double()).square().mean()
    loss.backward()
    return loss.detach()


class Decayed:
    """A stock optimizer with the decay of a run: decoupled, whatever the optimizer."""

    def __init__(self, optimizer_class, params, weight_decay=0.0, **options):
        if "weight_decay" in options or optimizer_class in (torch.optim.AdamW, torch.optim.Muon):
            options["weight_decay"] = 0.0
        self.stock, self.decay = optimizer_class(params, **options), weight_decay

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.stock.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1 - group["lr"] * self.decay)
        self.stock.step()
        return loss


def trained(model, optimizer, groups, zero_grad, steps=range(6)):
    """Steps with a closure and without, both kinds of zeroed gradients, a missing gradient, another learning rate."""
    losses = []
    for step in steps:
        zero_grad(set_to_none=step % 2 == 0)
        if step == 4:
            for group in groups():
                group["lr"] *= 0.5
        if step % 3 == 1:
            losses.append(optimizer.step(lambda step=step: backward(model, step)))
            continue
        losses.append(backward(model, step))
        if step == 3:
            next(model.parameters()).grad = None
            for named in groups():
                if named.get("kind") == "coords":
                    named["params"][0].grad = None
        assert optimizer.step() is None
    return torch.stack(losses)


@cases(lambda name: name in REFUSED)
@each_mode
def test_optimizers_that_no_run_supports_are_refused_when_it_is_made(optimizer_class, options, mode):
    kind, words = REFUSED[optimizer_class.__name__]
    with pytest.raises(kind, match=words):
        MODES[mode](model_for(optimizer_class), "full()", optimizer_class, **options)


@each_accepted
@each_mode
def test_an_optimizer_of_torch_steps_as_it_does_alone(optimizer_class, options, mode):
    plain, model = model_for(optimizer_class), model_for(optimizer_class)
    optimizer = MODES[mode](model, "full()", optimizer_class, **options)
    stock = Decayed(optimizer_class, plain.parameters(), **copy.deepcopy(options))  # a tensor is changed in place
    losses = trained(model, optimizer, lambda: optimizer.param_groups, optimizer.zero_grad)
    expected = trained(plain, stock, lambda: stock.stock.param_groups, stock.stock.zero_grad)
    tolerance = MUON if optimizer_class is torch.optim.Muon else TOLERANCE
    assert gap({"loss": losses}, {"loss": expected}) <= tolerance
    assert gap(optimizer.weights(), dict(plain.named_parameters())) <= tolerance
    assert not torch.equal(optimizer.weights()["0.weight"], model_for(optimizer_class)[0].weight)


@each_accepted
@each_mode
def test_a_state_saved_to_a_file_goes_on_bit_for_bit(optimizer_class, options, mode):
    model = model_for(optimizer_class)
    optimizer = MODES[mode](model, "svd(rank=3, every=2)", optimizer_class, **options)
    trained(model, optimizer, lambda: optimizer.param_groups, optimizer.zero_grad, range(3))
    state, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    saved, kept = through_a_file(state), copy.deepcopy(state)
    trained(model, optimizer, lambda: optimizer.param_groups, optimizer.zero_grad, range(3, 6))
    for given in (saved, kept):
        other = model_for(optimizer_class)
        resumed = MODES[mode](other, "svd(rank=3, every=2)", optimizer_class, **options)
        other.load_state_dict(weights)
        resumed.load_state_dict(given)
        trained(other, resumed, lambda resumed=resumed: resumed.param_groups, resumed.zero_grad, range(3, 6))
        assert_equal_bits(resumed.weights(), optimizer.weights())


@each_kind
@each_mode
def test_ways_to_compute_a_step_are_those_of_torch(optimizer_class, options, mode):
    """What torch steps alone is stepped; anything else is refused when the run is made."""
    plain, model = model_for(optimizer_class), model_for(optimizer_class)
    try:
        stock = optimizer_class(plain.parameters(), **copy.deepcopy(options))
        backward(plain, 0)
        stock.step()
    except (RuntimeError, ValueError, AssertionError):
        with pytest.raises(SpecError):
            MODES[mode](model, "full()", optimizer_class, **options)
        return
    optimizer = MODES[mode](model, "full()", optimizer_class, **options)
    trained(model, optimizer, lambda: optimizer.param_groups, optimizer.zero_grad)


@each_mode
@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_what_coordinates_cannot_be_stepped_with_is_refused_in_words(option, mode):
    with pytest.raises(SpecError, match=f"{option}=True .*leave"):
        MODES[mode](model_for(None), "full()", "adam", **{option: True})
    with pytest.raises(SpecError):
        MODES[mode](model_for(None), "full()", "adam", moments="8bit", min_8bit_size=2, **{option: True})


HOOKS = {
    "step_pre": ("register_step_pre_hook", 3),
    "step_post": ("register_step_post_hook", 3),
    "save_pre": ("register_state_dict_pre_hook", 1),
    "save_post": ("register_state_dict_post_hook", 2),
    "load_pre": ("register_load_state_dict_pre_hook", 2),
    "load_post": ("register_load_state_dict_post_hook", 1),
}


@contextmanager
def watched(calls):
    """The hooks of every optimizer's step; and nothing of them afterwards."""
    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def transcript(model, make):
    calls = []
    with watched(calls):
        optimizer = make(model)
        handles = []
        for name, (register, arguments) in HOOKS.items():

            def hook(*given, name=name, arguments=arguments):
                assert given[0] is optimizer
                assert len(given) == arguments
                calls.append((name, *(type(other).__name__ for other in given[1:])))

            handles.append(getattr(optimizer, register)(hook))
        for step in range(4):
            calls.append(("step", step))
            optimizer.zero_grad()
            if step % 2:
                optimizer.step(lambda step=step: backward(model, step))
            else:
                backward(model, step)
                optimizer.step()
        calls.append("save")
        saved = copy.deepcopy(optimizer.state_dict())
        calls.append("load")
        optimizer.load_state_dict(saved)
        for handle in handles:
            handle.remove()
        calls.append("removed")
        backward(model, 4)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    return calls


@each_mode
@pytest.mark.parametrize("rules", ["svd(rank=3, every=2)", "pca(rank=3, every=1)"])
@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"moments": "8bit", "min_8bit_size": 2}], ids=str)
def test_hooks_are_called_as_in_torch(options, rules, mode):
    """Also where a run steps other optimizers of its own: for each layer, for a part of the moments, to learn a basis."""
    expected = transcript(model_for(None), lambda model: torch.optim.Adam(model.parameters(), lr=1e-2))
    assert transcript(model_for(None), lambda model: MODES[mode](model, rules, "adam", lr=1e-2, **options)) == expected
    calls = Counter(call if isinstance(call, str) else call[0] for call in expected)
    assert all(calls[name] == 4 for name in ("step_pre", "step_post"))
    assert all(calls[name] == 5 for name in ("global pre", "global post"))
    assert all(calls[name] == 1 for name in ("save_pre", "save_post", "load_pre", "load_post"))


def test_global_hooks_are_back_after_a_step_that_fails():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["momentum"] == 0.5:
                raise KeyboardInterrupt
            return super().step(closure)

    calls = []
    model = model_for(None)
    optimizer = lingrad.wrap(model, "svd(rank=3)", Failing, lr=1e-2)
    with watched(calls):
        optimizer.param_groups[0]["momentum"] = 0.5
        backward(model, 0)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        optimizer.param_groups[0]["momentum"] = 0.0
        optimizer.step()
    assert calls == ["global pre", "global pre", "global post"]


@each_mode
def test_hooks_of_a_state_change_what_is_saved_and_loaded(mode):
    model = model_for(None)
    optimizer = MODES[mode](model, "svd(rank=3, every=2)", "adam", lr=1e-2)
    backward(model, 0)
    optimizer.step()
    seen = []

    def packed(_, state):
        seen.append({key for entries in state["state"].values() for key in entries})
        return {"inside": state}

    handle = optimizer.register_state_dict_post_hook(packed)
    saved = optimizer.state_dict()
    handle.remove()
    assert list(saved) == ["inside"]
    assert {"subspace.step", "exp_avg"} <= seen[0]
    loaded, failed = [], []
    optimizer.register_load_state_dict_post_hook(lambda _: loaded.append(optimizer.state_dict()))
    with pytest.raises(lingrad.errors.CheckpointError):
        optimizer.load_state_dict(saved)
    assert not loaded
    optimizer.register_load_state_dict_pre_hook(lambda _, state: failed.append(state.pop("extra")))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["inside"])
    given = {**saved, "extra": 1}
    optimizer.load_state_dict(given)
    assert failed == [1]
    assert "extra" in given  # hooks get a shallow copy
    assert len(loaded) == 1


@each_mode
def test_a_hook_may_give_a_step_other_arguments(mode):
    for make in (lambda m: MODES[mode](m, "svd(rank=3)", lr=1e-2), lambda m: torch.optim.SGD(m.parameters(), lr=1e-2)):
        model = model_for(None)
        optimizer = make(model)
        optimizer.register_step_pre_hook(lambda o, args, kwargs, model=model: ((o,), {"closure": lambda: backward(model, 1)}))
        assert torch.equal(optimizer.step(), backward(model_for(None), 1))


@each_mode
def test_a_step_is_one_step_to_a_profiler(mode):
    model = model_for(None)
    optimizer = MODES[mode](model, "svd(rank=3)", lr=1e-2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    names = Counter(event.name for event in profiled.events())
    assert names["Optimizer.step#SubspaceOptimizer.step"] == names["Optimizer.zero_grad#SubspaceOptimizer.zero_grad"] == 1


SCHEDULES = {
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 3),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=2),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.8),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-2, total_steps=8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=3),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.StepLR(o, 2)], milestones=[3]
    ),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.3),
}


def subclasses(kind):
    return {kind}.union(*(subclasses(other) for other in kind.__subclasses__()))


def test_every_scheduler_of_torch_has_a_case():
    found = {kind.__name__ for kind in subclasses(schedulers.LRScheduler) if kind.__module__.startswith("torch.optim")}
    assert {name for name in found if not name.startswith("_")} - {"LRScheduler"} <= SCHEDULES.keys()


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_of_torch_set_the_rates_of_every_group(name, lr):
    """With a rate in a tensor, which schedulers change in place, each group has its own."""
    model, plain = model_for(None), model_for(None)
    optimizer = lingrad.wrap(model, "full()", "adam", lr=lr)
    stock = torch.optim.Adam(plain.parameters(), lr=copy.deepcopy(lr))
    scheduler, expected = SCHEDULES[name](optimizer), SCHEDULES[name](stock)
    assert len(optimizer.param_groups) == 2
    for step in range(7):
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates == [float(stock.param_groups[0]["lr"])] * 2
        for m, o, s in ((model, optimizer, scheduler), (plain, stock, expected)):
            o.zero_grad()
            loss = backward(m, step)
            o.step()
            s.step(loss + step) if name == "ReduceLROnPlateau" else s.step()
    assert scheduler.state_dict().keys() == expected.state_dict().keys()
    assert gap(optimizer.weights(), dict(plain.named_parameters())) <= TOLERANCE


@each_mode
def test_a_scaler_skips_steps_that_overflow(mode):
    plain, model = model_for(None), model_for(None)
    optimizer = MODES[mode](model, "full()", "adam", lr=1e-2)
    stock = torch.optim.Adam(plain.parameters(), lr=1e-2)
    scales = []
    for m, o in ((model, optimizer), (plain, stock)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        for step in range(6):
            o.zero_grad()
            loss = m(torch.full((2, 5), float(step + 1)).double()).square().sum() * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(o)
            scaler.step(o)
            scaler.update()
            scales.append(scaler.get_scale())
    assert scales[:6] == scales[6:]
    assert scales[2] < scales[1]
    assert gap(optimizer.weights(), dict(plain.named_parameters())) <= TOLERANCE


@each_mode
def test_what_an_optimizer_is_besides_its_steps(mode):
    model = model_for(None)
    optimizer = MODES[mode](model, "svd(rank=3)", "adam", lr=1e-2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == 1e-2
    assert "lr: 0.01" in repr(optimizer)
    before = copy.deepcopy(optimizer.weights())
    optimizer.step()  # of no gradient at all
    assert_equal_bits(optimizer.weights(), before)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ModeError, match="cannot be copied or pickled"):
            copied(optimizer)
    with pytest.raises(ModeError, match="pass them all to lingrad"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    for group, param in itertools.chain.from_iterable(((g, p) for p in g["params"]) for g in optimizer.param_groups):
        assert param.is_leaf, group["name"]
        assert param.requires_grad
