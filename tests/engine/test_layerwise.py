"""Stepping inside the backward: the same trajectory as any other run, with no two gradients at once."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lingrad
from lingrad import optimizers
from lingrad.errors import ModeError, SpecError
from tests.support.models import gap, llama, text_batches, text_loss, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES

SPECS = ("svd(rank=4, every=3)", "svd(rank=4, every=2, side=both)", "random(rank=4, every=2)", "pca(rank=4)", "full()")


def trained(build, batches, loss, mode, spec, base, *, layerwise, **options):
    model = build()
    optimizer = MODES[mode](model, spec, base, layerwise=layerwise, weight_decay=0.1, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for (batch,) in batches:
        loss(model, batch).backward()
        if layerwise:
            assert all(p.grad is None for g in optimizer.param_groups for p in g["params"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer.weights()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", ["llama", "zoo"])
def test_the_trajectory_is_that_of_any_other_run(model, spec, mode):
    build, batches, loss = {
        "llama": (llama, text_batches(7, micro=1), text_loss),
        "zoo": (zoo, zoo_batches(7, micro=1), zoo_loss),
    }[model]
    spec = spec.replace("rank=4", "rank=4, clip=true") if "rank" in spec else spec
    one, other = (trained(build, batches, loss, mode, spec, "adamw", lr=1e-2, layerwise=lw) for lw in (True, False))
    assert gap(one, other) <= 1e-12


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", [name for name in optimizers.names() if name != "adamw8bit"])
def test_with_every_base(base, mode):
    batches = text_batches(5, micro=1)
    one, other = (
        trained(llama, batches, text_loss, mode, "svd(rank=4, every=3)", base, lr=1e-3, layerwise=lw) for lw in (True, False)
    )
    assert gap(one, other) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_a_second_backward_before_the_step_is_refused_and_zero_grad_mends_it(mode):
    model, (batch,) = llama(), text_batches(1, micro=1)[0]
    optimizer = MODES[mode](model, "svd(rank=4)", "adamw", lr=1e-3, layerwise=True)
    text_loss(model, batch).backward()
    with pytest.raises(
        ModeError, match="a second backward reached .* before step\\(\\); with layerwise=True each backward is a step"
    ):
        text_loss(model, batch).backward()
    optimizer.zero_grad()
    text_loss(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_there_is_no_norm_to_clip_by(mode):
    optimizer = MODES[mode](llama(), "svd(rank=4)", "adamw", lr=1e-3, layerwise=True)
    with pytest.raises(ModeError, match="there is no norm to clip by; leave layerwise out"):
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize("mode", MODES)
def test_state_resumes_to_the_bit(mode):
    batches = text_batches(6, micro=1)
    make = MODES[mode]

    def fresh():
        model = llama()
        return model, make(model, "svd(rank=4, every=4)", "adamw", lr=1e-2, layerwise=True)

    def steps(model, optimizer, chosen):
        for (batch,) in chosen:
            text_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh()
    steps(model, optimizer, batches[:3])
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps(model, optimizer, batches[3:])
    again, resumed = fresh()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    steps(again, resumed, batches[3:])
    assert gap(resumed.weights(), optimizer.weights()) == 0


def test_the_model_is_given_back_and_a_switch_goes_on():
    batches = text_batches(6, micro=1)
    weights = {}
    for switched in (False, True):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=4, every=4)", "adamw", lr=1e-2, layerwise=True)
        for i, (batch,) in enumerate(batches):
            if switched and i in (2, 5):
                optimizer.switch("adapter" if i == 2 else "optimizer")
            text_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.detach()
        weights[switched] = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        text_loss(model, batches[0][0]).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert gap(weights[True], weights[False]) <= 1e-12


class TestReleasedCoordinates:
    """In optimizer mode coordinates are zero between steps, and hold no memory."""

    def optimizer(self, mode="optimizer"):
        model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
        return model, MODES[mode](model, {"*": "svd(rank=4)"}, "adamw", lr=1e-2)

    def held(self, optimizer):
        return [sub.coords.untyped_storage().nbytes() for sub in optimizer.subspaces]

    def test_they_hold_memory_in_adapter_mode_and_within_a_step_only(self):
        model, optimizer = self.optimizer()
        for _ in range(2):
            model(torch.randn(5, 16)).sum().backward()
            assert self.held(optimizer) == [4, 4]
            optimizer.step()
            assert self.held(optimizer) == [4, 4]
        optimizer.switch("adapter")
        assert self.held(optimizer) == [4 * 24 * 4, 4 * 8 * 4 * 3]
        optimizer.switch("optimizer")
        assert self.held(optimizer) == [4, 4]

    def test_they_can_be_read_moved_and_copied(self):
        model, optimizer = self.optimizer()
        coords = optimizer.subspaces[0].coords
        assert torch.equal(coords, torch.zeros(coords.shape))
        assert torch.equal(copy.deepcopy(model)[0].lingrad.coords, coords)
        model.double()
        assert coords.dtype == torch.float64
        model(torch.randn(5, 16, dtype=torch.float64)).sum().backward()
        optimizer.step()
        assert self.held(optimizer) == [8, 8]

    def test_a_write_from_outside_gives_them_memory(self):
        _, optimizer = self.optimizer()
        for sub in optimizer.subspaces:
            sub.coords.data.add_(torch.ones(sub.coords.shape))
            assert not sub.released
            assert torch.equal(sub.coords, torch.ones(sub.coords.shape))


def test_layerwise_is_a_yes_or_no():
    with pytest.raises(SpecError, match="layerwise must be True, False or 'coordinates', not 'yes'"):
        lingrad.wrap(llama(), "svd(rank=4)", "adamw", lr=1e-3, layerwise="yes")


class TestWhatCannotBeHad:
    def test_a_process_group(self, tmp_path):
        """DistributedDataParallel writes gradients back after the backward; also where the group came later."""
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
        try:
            model = nn.Linear(6, 4)
            lingrad.wrap(model, {"*": "svd(rank=2)"}, "sgd", lr=0.1, layerwise=True)
            with pytest.raises(ModeError, match="leave layerwise out where there is a process group"):
                model(torch.randn(3, 6)).sum().backward()
        finally:
            torch.distributed.destroy_process_group()

    def test_a_base_that_counts_for_all_parameters_at_once(self):
        class Counting(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    group["k"] = group.get("k", 0) + 1
                return super().step(closure)

        with pytest.raises(SpecError, match="base 'Counting' has one 'k' for all of them; leave layerwise out"):
            lingrad.wrap(nn.Linear(6, 4), {"*": "svd(rank=2)"}, Counting, lr=0.1, layerwise=True)

    @pytest.mark.parametrize("base", optimizers.names())
    def test_every_known_base_may_step_parameters_one_by_one(self, base):
        lingrad.wrap(nn.Linear(6, 4), {"*": "svd(rank=2)"}, base, lr=0.1, layerwise=True)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 8))


RULES = {"0": "svd(rank=4)", "2": "svd(rank=4)"}


def one_step(model, optimizer):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", optimizers.names())
def test_every_parameter_moves_on_after_a_cast(base, mode, layerwise):
    dtype = torch.bfloat16 if base in ("adamw8bit",) else torch.float64
    model = net()
    optimizer = MODES[mode](model, RULES, base, lr=0.1, layerwise=layerwise)
    one_step(model, optimizer)
    model.to(dtype)
    one_step(model, optimizer)
    before = {name: w.detach().clone() for name, w in optimizer.weights().items()}
    one_step(model, optimizer)
    for name, weight in optimizer.weights().items():
        assert weight.dtype == dtype
        assert not torch.equal(weight, before[name]), name


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_cast_between_load_and_the_first_step(mode, layerwise):
    make = MODES[mode]
    model = net()
    optimizer = make(model, RULES, "adamw", lr=0.1, layerwise=layerwise)
    one_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    again = net()
    resumed = make(again, RULES, "adamw", lr=0.1, layerwise=layerwise)
    resumed.load_state_dict(saved)
    again.double()
    one_step(again, resumed)
    assert all(m.dtype == torch.float64 for e in resumed._run.stepper.state.values() for m in e.values() if m.dim())


def test_a_frozen_parameter_and_a_switch():
    model = net()
    optimizer = lingrad.wrap(model, RULES, "adamw", lr=0.1, layerwise=True)
    one_step(model, optimizer)
    model[4].bias.requires_grad_(False)
    optimizer.switch("adapter")
    one_step(model, optimizer)
    assert not model[4].bias.requires_grad


def test_copies_are_for_evaluation():
    model = net()
    optimizer = lingrad.wrap(model, RULES, "adamw", lr=0.1, layerwise=True)
    one_step(model, optimizer)
    x = torch.randn(2, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(other(x), model(x))


def test_a_rewind_after_a_backward_that_was_not_stepped():
    model = net()
    optimizer = lingrad.wrap(model, RULES, "adamw", lr=0.1, layerwise=True)
    one_step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    model(torch.randn(2, 16)).sum().backward()
    optimizer.load_state_dict(saved)
    one_step(model, optimizer)
