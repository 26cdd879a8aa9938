"""Bases that a rule refreshes: against each rule written out by hand, in both modes, resumed at every step, in two processes.

Tolerance: 1e-12 relative over 24 steps in float64, as in test_reference.py. The thresholds are chosen so that some bases change
at a check and others do not, which each test asserts.
"""

from functools import cache

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import CheckpointError, ModeError, SpecError
from tests.contract.test_reference import Model
from tests.support import reference, scheduled
from tests.support.models import gap, llama, text_batches, train
from tests.support.runs import MODES, assert_equal_bits, each_mode, through_a_file, weights_of
from tests.support.watch import NoWaiting

pytestmark = [pytest.mark.thinned(4), pytest.mark.rare(3)]

TOLERANCE = 1e-12
STEPS, EVERY = 24, 3
COMMON = {"lr": 1e-2, "weight_decay": 0.1, "scale": 0.25}
RULES = {
    "energy(fraction=0.9)": lambda: scheduled.Energy(EVERY, 0.9),
    "energy(fraction=0.0, least=0.8)": lambda: scheduled.Energy(EVERY, 0.0, 0.8),
    "overlap(threshold=0.5, after=2)": lambda: scheduled.Overlap(EVERY, 0.5, 2),
    "overlap(threshold=0.3, after=1, longest=6)": lambda: scheduled.Overlap(EVERY, 0.3, 1, 6),
    "path(threshold=0.6)": lambda: scheduled.Path(EVERY, 0.6),
    "path(threshold=0.2, measure=displacement)": lambda: scheduled.Displacement(EVERY, 0.2),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def made(mode, rule, side="short", transform="svd", **options):
    model = Model()
    spec = f"{transform}(rank={reference.RANK}, every={EVERY}, side={side}, schedule={rule})"
    return model, MODES[mode](model, {"*weight": spec, "*": "none"}, "adamw", **{**COMMON, "eps": 1e-4, **options})


def stepped(model, optimizer, steps, micro=2, clip=None):
    """The steps in which the basis of each weight changed."""
    changed = {sub.name: [] for sub in optimizer.subspaces}
    for micro_batches in steps:
        before, step = optimizer.refreshes(), optimizer._run.step
        optimizer.zero_grad()
        for x, y in micro_batches:
            ((model(x) - y).square().mean() / micro).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        for name, count in optimizer.refreshes().items():
            changed[name] += [step] * (count - before[name])
    return changed


@cache
def expected(rule, side, carry="keep"):
    return scheduled.galore(reference.data(STEPS), side, RULES[rule], decay=0.1, lr=1e-2, scale=0.25, eps=1e-4, carry=carry)


@each_mode
@each_rule
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_run_is_its_rule_written_out(mode, rule, side):
    model, optimizer = made(mode, rule, side)
    changed = stepped(model, optimizer, reference.data(STEPS))
    weights, steps = expected(rule, side)
    assert changed == steps
    assert gap(weights_of(optimizer), weights) <= TOLERANCE


@each_rule
def test_the_rules_have_something_to_decide(rule):
    every = {step for side in ("left", "right", "both") for changed in expected(rule, side)[1].values() for step in changed[1:]}
    kept = [len(changed) for side in ("left", "right", "both") for changed in expected(rule, side)[1].values()]
    assert every
    assert min(kept) < STEPS // EVERY


@each_mode
@pytest.mark.parametrize("carry", ["reset", "rotate", "transport"])
def test_moments_are_carried_over_at_refreshes_only(mode, carry):
    rule = "path(threshold=0.6)"
    model, optimizer = made(mode, rule, "left", carry=carry)
    stepped(model, optimizer, reference.data(STEPS))
    assert gap(weights_of(optimizer), expected(rule, "left", carry)[0]) <= TOLERANCE


@each_rule
def test_a_clip_between_backward_and_step_changes_no_decision(rule):
    """The norm is that of the gradient in the basis that the step will use, chosen before; a norm of 1e9 clips nothing."""
    for clip in (1e9, 0.3):
        changed, ends = [], []
        for mode in MODES:
            model, optimizer = made(mode, rule, "left")
            changed.append(stepped(model, optimizer, reference.data(STEPS), clip=clip))
            ends.append(weights_of(optimizer))
        assert changed[0] == changed[1]
        assert gap(*ends) <= TOLERANCE
        if clip == 1e9:
            assert changed[0] == expected(rule, "left")[1]


class Shadow:
    """What a run's bases and true gradients are at each step, from outside."""

    def __init__(self, mode, rule, transform, side="right"):
        self.model, self.optimizer = made(mode, rule, side, transform)

    def step(self, micro_batches):
        """(G, bases in use before, after) by weight."""
        weights = {name: weight.detach().clone().requires_grad_() for name, weight in self.optimizer.weights().items()}
        found = reference.gradients(weights, {}, micro_batches, weights)
        before = self.sides()
        stepped(self.model, self.optimizer, [micro_batches])
        after = self.sides()
        return {sub.name: (found[sub.name], before[sub.name], after[sub.name]) for sub in self.optimizer.subspaces}

    def sides(self):
        return {sub.name: sub.map().tensors[0].clone() for sub in self.optimizer.subspaces}


@each_mode
@pytest.mark.parametrize("transform", ["power", "randomized"])
@pytest.mark.parametrize("rule", ["overlap(threshold=0.5, after=2)", "path(threshold=0.6)"])
def test_bases_that_are_learned_from_sketches(mode, transform, rule):
    """They change at the end of the step that gathers the sketch, so that the next step is the first one in the new basis."""
    run = Shadow(
        mode, rule + (", solver=randomized" if transform == "randomized" else ""), transform.replace("randomized", "svd")
    )
    rules, counts = {sub.name: RULES[rule]() for sub in run.optimizer.subspaces}, []
    for step, micro_batches in enumerate(reference.data(STEPS)):
        for name, (gradient, before, after) in run.step(micro_batches).items():
            mine, projected = rules[name], gradient @ before
            changes = mine.wants(step, None, None)
            if step:
                mine.stepped(projected)
            if changes:
                eye = torch.eye(1, dtype=torch.float64)
                mine.changed(step, None, (eye, before) if step else None, (eye, after))
            assert changes == (not torch.equal(before, after)), (name, step)
            counts.append(changes)
    assert 3 < sum(counts) < len(counts) // EVERY


@each_mode
@pytest.mark.parametrize("solver", ["", ", solver=randomized"])
def test_an_energy_that_is_estimated_decides_as_the_true_one_where_that_is_clear(mode, solver):
    least, clear = 0.8, 0.12
    run = Shadow(mode, f"energy(fraction=0, least={least}){solver}", "svd" if solver else "power")
    decided = set()
    for step, micro_batches in enumerate(reference.data(STEPS)):
        for name, (gradient, before, after) in run.step(micro_batches).items():
            energy, changes = float((gradient @ before).norm() / gradient.norm()), not torch.equal(before, after)
            if step == 0 or step % EVERY:
                assert changes == (step == 0), name
            elif abs(energy - least) > clear:
                assert changes == (energy < least), (name, step, energy)
                decided.add(changes)
    assert True in decided


def resumed(mode, rule, at, options):
    batches = reference.data(STEPS)
    ends = []
    for stops in (False, True):
        model, optimizer = made(mode, rule, "short", **options)
        stepped(model, optimizer, batches[:at])
        if stops:
            saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            model, optimizer = made(mode, rule, "short", **options)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            again = through_a_file(optimizer.state_dict())["state"]
            for index, entries in saved["optimizer"]["state"].items():
                assert entries.keys() == again[index].keys()
        changed = stepped(model, optimizer, batches[at:])
        ends.append((changed, weights_of(optimizer), optimizer.state_dict()["state"]))
    assert ends[0][0] == ends[1][0]
    assert_equal_bits(ends[0][1], ends[1][1])
    for index, entries in ends[0][2].items():
        for key, value in entries.items():
            other = ends[1][2][index][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key


@each_mode
@each_rule
@pytest.mark.parametrize("at", range(1, 14))
def test_a_run_resumes_to_the_bit_at_every_step(mode, rule, at):
    resumed(mode, rule, at, {"stagger": at % 2 == 0})


class TestCheckpoints:
    def saved(self, rule, steps=5):
        model, optimizer = made("optimizer", rule)
        stepped(model, optimizer, reference.data(steps))
        return through_a_file(optimizer.state_dict())

    def load(self, rule, saved):
        made("optimizer", rule)[1].load_state_dict(saved)

    @pytest.mark.parametrize("key", ["interval", "since", "streak", "wanted", "path", "steps"])
    def test_one_without_what_a_schedule_remembers_is_refused(self, key):
        saved = self.saved("path()")
        del saved["state"][0][f"subspace.schedule.{key}"]
        with pytest.raises(CheckpointError, match=f"the checkpoint has no 'subspace.schedule.{key}' for first.weight"):
            self.load("path()", saved)

    @pytest.mark.parametrize(
        "values", [{"interval": 4}, {"interval": 0}, {"interval": 9}, {"streak": 5}, {"since": 1}, {"wanted": -2}]
    )
    def test_numbers_that_no_run_leaves_are_refused(self, values):
        saved = self.saved("overlap()")
        saved["state"][0] |= {f"subspace.schedule.{key}": value for key, value in values.items()}
        with pytest.raises(CheckpointError, match="which no run of every=3 leaves; give an earlier checkpoint"):
            self.load("overlap()", saved)

    def test_another_rule_is_another_spec(self):
        with pytest.raises(CheckpointError, match="path"):
            self.load("energy()", self.saved("path()"))

    def test_a_run_without_a_rule_is_saved_as_before(self):
        model = Model()
        optimizer = lingrad.wrap(model, "svd(rank=3, every=3)", **COMMON)
        stepped(model, optimizer, reference.data(4))
        assert not any("schedule" in key for entries in optimizer.state_dict()["state"].values() for key in entries)


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the numbers that the host reads."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.found += name in ("_local_scalar_dense", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


@each_mode
@each_rule
@pytest.mark.parametrize("transform", ["svd", "power"])
def test_the_host_reads_nothing_off_the_checks(mode, rule, transform):
    model, optimizer = made(mode, rule, transform=transform)
    for step, micro_batches in enumerate(reference.data(STEPS)):
        if step % EVERY == 0 or (step + 1) % EVERY == 0:  # a rule that adds up steps decides at the end of the step before
            stepped(model, optimizer, [micro_batches])
            continue
        with NoWaiting():
            optimizer.zero_grad()
            for x, y in micro_batches:
                (model(x) - y).square().mean().backward()
            optimizer.step()


def test_a_check_of_all_weights_reads_once():
    """Three figures of as many weights are one tensor of three; nothing is gathered or read in the step itself then."""
    model, optimizer = made("optimizer", "path(threshold=0.0001)")
    reads = []
    for micro_batches in reference.data(STEPS):
        with Reads() as mode:
            stepped(model, optimizer, [micro_batches])
        reads.append(mode.found)
    assert set(optimizer.refreshes().values()) == {1}
    assert reads[0] > 3
    assert reads[1:] == [3 if (step + 1) % EVERY == 0 else 0 for step in range(1, STEPS)]


SHARED = "(rank=4, every=3, side=right, schedule={})"


@pytest.mark.parametrize("rule", ["energy(fraction=0.95)", "overlap(threshold=0.2, after=1)", "path(threshold=0.7)"])
@pytest.mark.parametrize("transform", ["svd", "power"])
def test_layers_that_share_a_basis_in_turns(rule, transform):
    ends, counts = [], []
    for mode in MODES:
        model = llama()
        optimizer = MODES[mode](model, transform + SHARED.format(rule), lr=1e-2, share="input", stagger=True, carry="rotate")
        train(model, optimizer, text_batches(14, micro=2), schedule=False)
        ends.append(weights_of(optimizer))
        counts.append(optimizer.refreshes())
    assert gap(*ends) <= TOLERANCE
    assert counts[0] == counts[1]
    assert 1 < min(counts[0].values()) <= max(counts[0].values()) <= 5
    assert len({sub.basis.cadence for sub in optimizer.subspaces}) < len(optimizer.subspaces)


NEVER = ["energy(fraction=0.001)", "path(threshold=0.0001)", "path(threshold=0.0001, measure=displacement)"]
RESIDUALS = [{"residual": rule} for rule in ("scaled", "sign", "feedback", "sampled(q=0.3)")]
OPTIONS = [{}, {"layerwise": True}, *RESIDUALS, {"ledger": True}]


@pytest.mark.parametrize("transform", ["svd", "power"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rule", "as_plain"), [(rule, 0) for rule in NEVER] + [("path(threshold=1.0)", EVERY)])
def test_checks_leave_no_trace(transform, options, rule, as_plain):
    """A rule by which no check refreshes is every=0 to the bit, and one by which each does is every=T."""
    batches, ends = reference.data(STEPS, micro=1), []
    for spec in (f"every={EVERY}, schedule={rule}", f"every={as_plain}"):
        model = Model()
        optimizer = lingrad.wrap(
            model, {"*weight": f"{transform}(rank=3, side=left, {spec})", "*": "none"}, **COMMON, **options
        )
        stepped(model, optimizer, batches, micro=1)
        ends.append((weights_of(optimizer), optimizer.refreshes()))
    assert ends[0][1] == ends[1][1]
    assert_equal_bits(ends[0][0], ends[1][0])


@each_rule
def test_weights_that_step_in_the_backward_decide_as_others(rule):
    batches, ends = reference.data(STEPS, micro=1), []
    for options in ({}, {"layerwise": True}):
        model, optimizer = made("optimizer", rule, "left", **options)
        ends.append((stepped(model, optimizer, batches, micro=1), weights_of(optimizer)))
    assert ends[0][0] == ends[1][0]
    assert_equal_bits(ends[0][1], ends[1][1])


def test_a_switch_between_checks_changes_nothing():
    ends = []
    for switches in (False, True):
        model, optimizer = made("optimizer", "path(threshold=0.6)")
        for step, micro_batches in enumerate(reference.data(STEPS)):
            if switches and step % 4 == 1:
                optimizer.switch("adapter" if optimizer.mode == "optimizer" else "optimizer")
            stepped(model, optimizer, [micro_batches])
        ends.append(weights_of(optimizer))
    assert gap(*ends) <= TOLERANCE


def test_a_step_that_fails_is_not_counted():
    model, optimizer = made("optimizer", "path()")
    (x, y), *_ = reference.data(1)[0]
    (model(x) - y).square().mean().backward()
    optimizer.step()
    built = optimizer.bases()[0]
    step, built.step = built.step, lambda *_: (_ for _ in ()).throw(MemoryError)
    with pytest.raises(MemoryError):
        optimizer.step()
    built.step = step
    assert {float(numbers[0]) for sub in optimizer.subspaces for _, numbers in sub.basis.cadence.paths.values()} == {1.0}


def test_a_weight_without_a_gradient_counts_no_step():
    model = nn.ModuleDict({"used": nn.Linear(8, 8, bias=False), "rare": nn.Linear(8, 8, bias=False)}).double()
    optimizer = lingrad.wrap(model, {"*": "svd(rank=2, every=3, schedule=path(threshold=1.0))"}, lr=1e-2)
    x = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step, batch in enumerate(x[:12]):
        optimizer.zero_grad()
        out = model["used"](batch) + (model["rare"](batch) if step < 2 else 0.0 * model["rare"](batch) if step < 7 else 0)
        out.tanh().square().sum().backward()
        optimizer.step()
    assert optimizer.refreshes() == {"used.weight": 4, "rare.weight": 1}  # a zero gradient gives no basis
    (path,) = optimizer.subspaces[1].basis.cadence.paths.values()
    assert float(path[1][0]) == 2


@each_mode
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_is_no_reason_to_stay(mode, value):
    """What it leaves in the sum says nothing; the next check begins anew."""
    model = Model()
    spec = f"svd(rank=3, every={EVERY}, schedule=path(threshold=0.0001))"
    optimizer = MODES[mode](model, {"*weight": spec, "*": "none"}, "sgd", lr=1e-3)
    for step, micro_batches in enumerate(reference.data(8)):
        if step == 4:
            kept = {param: param.detach().clone() for group in optimizer.param_groups for param in group["params"]}
            kept |= {sub.weight.param: sub.weight.param.detach().clone() for sub in optimizer.subspaces}
            for sub in optimizer.subspaces:
                sub.coords.grad.fill_(float(value))
            optimizer.step()
            for param, values in kept.items():  # as if it had not been stepped
                if 0 not in param.stride():
                    param.data.copy_(values)
            continue
        stepped(model, optimizer, [micro_batches])
    assert set(optimizer.refreshes().values()) == {2}


class TestRefusals:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("random(rank=2, schedule=path)", "of which this transform reads nothing"),
            ("pca(rank=2, schedule=energy)", "pca trains its basis by one step"),
            ("slice(rank=2, schedule=energy)", "the bases of all workers change between their rounds"),
            ("svd(rank=2, every=0, schedule=overlap)", "every=0 refreshes once"),
            (
                "kron(left=svd(rank=2, schedule=path), right=svd(rank=2))",
                "the left factor of kron refreshes every so many steps",
            ),
            ("experts(each=svd(rank=2, schedule=energy))", "give experts schedule=path"),
            ("svd(rank=2, schedule=lotus)", "unknown schedule 'lotus'. Known: energy, overlap, path"),
            ("svd(rank=2, schedule=pat)", "did you mean 'path'"),
            ("svd(rank=2, schedule=path(threshold=0))", "threshold must be over 0"),
            ("svd(rank=2, schedule=energy(fraction=0))", "there is no second refresh"),
            ("svd(rank=2, schedule=energy(least=2))", "least must be in 0...1"),
            ("svd(rank=2, schedule=overlap(after=0))", "after must be 1 or more"),
            ("svd(rank=2, schedule=overlap(longest=-1))", "longest must be 0"),
            ("svd(rank=2, schedule=path(measure=speed))", "measure"),
            ("svd(rank=2, schedule=path(2))", "options are written option=value"),
            ("svd(rank=2, schedule=3)", "expected a schedule, name"),
        ],
    )
    def test_in_words(self, spec, message):
        with pytest.raises(SpecError, match=message.replace("(", r"\(")):
            lingrad.wrap(Model(), spec, lr=1e-2)

    def test_in_python(self):
        with pytest.raises(SpecError, match="schedule must be a AdaptiveSchedule or none, not path"):
            lingrad.transforms.SVD(rank=2, schedule="path")

    def test_a_backward_across_a_refresh(self):
        model, optimizer = made("optimizer", "path(threshold=1.0)")
        (x, y), *_ = reference.data(1)[0]
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        assert optimizer._run.bases[0].due
        with pytest.raises(ModeError, match="is from before its basis was refreshed"):
            (model(x) - y).square().mean().backward()
