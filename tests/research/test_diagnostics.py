"""Diagnostics: each against a plain computation, and that a run does not notice them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import SpecError
from lingrad.methods import FullRank, Lingrad
from lingrad.research.diagnostics import DIAGNOSTICS, ObservedRun, make_diagnostic
from lingrad.research.diagnostics.bases import TOLERANCE, BasisOverlap, MomentMismatch, UpdateRank
from lingrad.research.diagnostics.halves import ReproducibleDirections
from lingrad.research.diagnostics.modes import ModeGap, RowOrderGap, SwitchedGap, largest_gap_of
from lingrad.research.plan import make_plan
from lingrad.research.task import Task
from lingrad.research.training import METRICS, train
from lingrad.testing import weight_gap

SIZES = (10, 14, 9)  # of the two layers


@dataclass(frozen=True)
class Dropped(Task):
    """Two layers with dropout, which draws from torch's random state in every forward."""

    def build(self, seed, dtype):
        torch.manual_seed(seed)
        n, m, k = SIZES
        return nn.Sequential(nn.Linear(n, m), nn.Dropout(0.3), nn.Tanh(), nn.Linear(m, k)).to(dtype)

    def batches(self, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield torch.randn(12, SIZES[0], generator=generator, dtype=torch.float64)

    def loss(self, model, batch):
        batch = batch.to(next(model.parameters()).dtype)
        return (model(batch) - batch[:, : SIZES[-1]]).square().mean()

    def judge(self, model, part):
        return {"loss": float(self.loss(model, torch.ones(2, SIZES[0])))}


def plan(*diagnostics, steps=8, dtype="float64", **run):
    entry = {"name": "a", "method": "svd(rank=3)"}
    run = {"dtype": dtype, "schedule": "linear", **run}
    content = {"name": "n", "task": {"kind": "text", "steps": steps}, "run": run, "entries": [entry], "search": {"space": {}}}
    made = make_plan({**content, "run": {**run, "diagnostics": list(diagnostics)}}, "plan.toml", Path())
    object.__setattr__(made, "task", Dropped())
    return made


def observed(diagnostic, method, *, steps=8, dtype=torch.float64):
    """Train with one diagnostic, by a loop of the test's own; yields after each step."""
    task = Dropped()
    model = task.build(1, dtype)
    training = method.prepare(model)
    run = ObservedRun(task, method, model, training, 1, steps, dtype, "cpu", lambda _: 1.0)
    diagnostic.begin(run)
    for step, batch in enumerate(task.batches(steps, 1), 1):
        run.changes.clear()
        with run.aside():
            diagnostic.before(batch)
        random = torch.get_rng_state()
        training.zero_grad()
        task.loss(training.model, batch).backward()
        training.step()
        with run.aside():
            values = diagnostic.after(step)
        yield step, run, values, batch, random


def measured(folder):
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds",)} for line in lines]


def end_of(folder, plan_, method):
    """Train and return the judged metrics, the lines, and the weights that the run ends with."""
    folder.mkdir()
    ends = []

    class Kept(type(plan_.task)):
        def judge(self, model, part):
            ends.append({name: param.detach().clone() for name, param in model.named_parameters()})
            return super().judge(model, part)

    object.__setattr__(plan_, "task", Kept())
    found = train(plan_, method, seed=1, part="final", out=folder)
    return found["metrics"], measured(folder), ends[0]


WAYS = [
    Lingrad("svd(rank=3, every=3)", None, "optimizer", {"lr": 1e-2, "seed": 1}),
    Lingrad("power(rank=3, every=2)", None, "adapter", {"lr": 1e-2, "seed": 1, "carry": "rotate"}),
    Lingrad("random(rank=3, every=2)", "sgd", "optimizer", {"lr": 1e-2, "seed": 1, "carry": "reset", "momentum": 0.9}),
    Lingrad("svd(rank=3, every=3)", None, "optimizer", {"lr": 1e-2, "seed": 1, "residual": "scaled"}),  # has no dual
    FullRank("adamw", {"lr": 1e-2}),
]


@pytest.mark.parametrize("method", WAYS, ids=lambda method: method.label)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_run_with_all_of_them_is_the_run_without_to_the_bit(tmp_path, method, dtype):
    without, bare, weights = end_of(tmp_path / "without", plan(dtype=dtype), method)
    metrics, lines, same = end_of(tmp_path / "with", plan(*DIAGNOSTICS, dtype=dtype), method)
    assert metrics == without
    assert [{key: line[key] for key in bare[0]} for line in lines] == bare
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    seen = {name for line in lines for name in line.keys() - bare[0].keys()}
    ours = isinstance(method, Lingrad)
    assert {"stable_rank", "numeric_rank"} <= seen
    assert ("gap" in seen) == (ours and "residual" not in method.options)
    assert ("overlap" in seen) == ("mismatch" in seen) == ours
    assert ("reproducible" in seen) == (ours and "random" not in str(method.rules))


def columns(sub, chosen):
    """The basis of a one-sided map as a dense matrix, from what the map does to unit vectors."""
    left, _ = sub.basis.transform.ranks(sub.basis.shape)
    p, q = sub.coords.shape
    if left is not None:
        eye = torch.zeros(p, q, dtype=torch.float64)
        eye[:, 0] = 1
        return torch.stack([chosen.lift(torch.diag(eye[:, 0])[:, [i]].expand(p, q).contiguous())[:, 0] for i in range(p)], 1)
    return torch.stack([chosen.lift(torch.eye(q, dtype=torch.float64)[[i]].expand(p, q).contiguous())[0] for i in range(q)], 1)


@pytest.mark.parametrize("rules", ["svd(rank=3, every=2)", "random(rank=3, every=2, kind=gaussian)", "pca(rank=3)"])
def test_overlap_is_that_of_the_spans(rules):
    """By projectors, tr(P_new P_old) / r, with P = B B^+ of the maps before and after the step."""
    method, found, before = Lingrad(rules, "sgd", "optimizer", {"lr": 1e-2, "seed": 1}), 0, {}
    for step, run, values, *_ in observed(BasisOverlap(), method):
        subs = run.optimizers[0].subspaces
        after = {sub.name: columns(sub, sub.map()) for sub in subs}
        projectors = [{name: b @ torch.linalg.pinv(b) for name, b in one.items()} for one in (before, after) if one]
        changed = bool(before) and any(not torch.equal(before[name], after[name]) for name in after)
        learned = step > 2 or "random" in rules  # what the start had is not compared
        if changed and learned and values:
            overlap = sum(float((projectors[0][n] * projectors[1][n]).sum()) / 3 for n in after) / len(after)
            # eigenvectors of float64 matrices of order 10: a few hundred eps
            assert values["overlap"] == pytest.approx(overlap, abs=1e-12)
            found += 1
        assert changed or not values
        before = after
    assert found >= 2


@pytest.mark.parametrize("carry", ["keep", "reset", "rotate", "transport"])
def test_mismatch_is_that_of_the_means(carry):
    """By the dense products C = S_new^T S_old, of a run whose means are copied before each step."""
    method = Lingrad("svd(rank=3, every=2)", "adam", "optimizer", {"lr": 1e-2, "seed": 1, "carry": carry, "eps": 1e-4})
    maps, means, found = {}, {}, 0
    for _, run, values, *_ in observed(MomentMismatch(), method):
        optimizer = run.optimizers[0]
        if values:
            apart = []
            for sub in optimizer.subspaces:
                mean = means[sub.name]
                moved = sub.map().project(maps[sub.name].lift(mean))
                kept = {"keep": mean, "reset": torch.zeros_like(mean)}.get(carry, moved)
                apart.append(float((kept - moved).norm() / mean.norm()))
            assert values["mismatch"] == pytest.approx(sum(apart) / len(apart), abs=1e-12)
            assert (values["mismatch"] == 0) == (carry in ("rotate", "transport"))
            found += 1
        maps = {sub.name: sub.map() for sub in optimizer.subspaces}
        means = {sub.name: optimizer.base.state[sub.coords]["exp_avg"].clone() for sub in optimizer.subspaces}
    assert found == 3


def test_what_has_no_means_has_no_mismatch():
    for base in ("sgd", torch.optim.Adamax):  # whose largest gradient so far is no moment
        method = Lingrad("svd(rank=3, every=2)", base, "optimizer", {"lr": 1e-2, "seed": 1})
        assert not any(values for _, _, values, *_ in observed(MomentMismatch(), method))


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_ranks_are_those_of_the_change(mode):
    method = Lingrad("svd(rank=3, every=4)", "adam", mode, {"lr": 1e-2, "seed": 1})
    start = Dropped().build(1, torch.float64).state_dict()
    at = {}
    for step, run, values, *_ in observed(UpdateRank(), method):
        if values:
            weights = run.optimizers[0].weights()
            changes = [weights[name] - start[name] for name in ("0.weight", "3.weight")]
            stable = [float(d.norm() ** 2 / torch.linalg.matrix_norm(d, 2) ** 2) for d in changes]
            numeric = [int(torch.linalg.matrix_rank(d, rtol=TOLERANCE)) for d in changes]
            assert values["stable_rank"] == pytest.approx(sum(stable) / 2, rel=1e-12)
            assert values["numeric_rank"] == sum(numeric) / 2
            at[step] = values["numeric_rank"]
    assert list(at) == [2, 4, 6, 8]
    assert at[2] == at[4] == 3  # one basis
    assert at[8] == 6  # two


def test_full_rank_has_a_rank_too():
    values = [values for _, _, values, *_ in observed(UpdateRank(), FullRank("adamw", {"lr": 1e-2}))][-1]
    assert values["numeric_rank"] == pytest.approx((10 + 9) / 2)  # all of both layers


@pytest.mark.parametrize("rules", ["svd(rank=4, every=3, side=left)", "power(rank=4, every=3, side=right)"])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_reproducible_directions_are_principal_angles_of_two_halves(rules, threshold):
    method = Lingrad(rules, "sgd", "optimizer", {"lr": 1e-2, "seed": 1})
    task, at = Dropped(), []
    model = task.build(1, torch.float64)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for step, run, values, batch, random in observed(ReproducibleDirections(threshold), method):
        if values:
            vectors = []
            torch.set_rng_state(random)  # as `before` found it
            for half in batch.chunk(2):
                model.load_state_dict(weights)
                model.zero_grad()
                task.loss(model, half).backward()
                svd = [torch.linalg.svd(model[i].weight.grad) for i in (0, 3)]
                vectors.append([u[:, :4] if "left" in rules else vh[:4].t() for u, _, vh in svd])
            counts = [int((torch.linalg.svdvals(a.t() @ b) > threshold).sum()) for a, b in zip(*vectors, strict=True)]
            assert values["reproducible"] == sum(counts) / 2
            # of planes of 4 in 9 to 14 dimensions few angles are below 26 degrees, and some below 60
            assert values["reproducible_by_chance"] < 1 if threshold == 0.9 else 1 < values["reproducible_by_chance"] <= 4
            at.append(step)
        weights = {name: weight.clone() for name, weight in run.optimizers[0].weights().items()}
    assert at == [1, 4, 7]


def test_equal_halves_agree_on_all_directions(monkeypatch):
    monkeypatch.setattr(Dropped, "batches", lambda self, steps, seed: [torch.eye(10, dtype=torch.float64).repeat(2, 1)] * steps)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    method = Lingrad("svd(rank=4, every=3)", "sgd", "optimizer", {"lr": 1e-2, "seed": 1})
    assert [v["reproducible"] for _, _, v, *_ in observed(ReproducibleDirections(), method) if v] == [4, 4, 4]


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_the_gap_is_that_to_the_other_mode(mode):
    """The same run in the other mode, made by hand, with the random states that the run had."""
    method = Lingrad("svd(rank=3, every=3)", "adam", mode, {"lr": 1e-2, "seed": 1})
    task = Dropped()
    model = task.build(1, torch.float32)
    other = (lingrad.adapt if mode == "optimizer" else lingrad.wrap)(model, "svd(rank=3, every=3)", "adam", lr=1e-2, seed=1)
    gaps = []
    for _, run, values, batch, random in observed(ModeGap(), method, dtype=torch.float32):
        with run.aside():
            torch.set_rng_state(random)
            other.zero_grad()
            task.loss(model, batch).backward()
            other.step()
        expected = weight_gap(run.optimizers[0].weights(), other.weights())[1]
        # float32 norms of a difference in the last digits
        assert values["gap"] == pytest.approx(expected, rel=1e-3)
        gaps.append(values["gap"])
    assert 0 < max(gaps) < 1e-3


def test_in_float64_the_modes_have_no_gap():
    method = Lingrad("svd(rank=3, every=3)", "adam", "adapter", {"lr": 1e-2, "seed": 1})
    assert all(values["gap"] <= 1e-12 for _, _, values, *_ in observed(ModeGap(), method))


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_a_run_whose_mode_is_switched_has_no_gap_in_float64(mode):
    method = Lingrad("svd(rank=3, every=3)", "adamw", mode, {"lr": 1e-2})
    diagnostic = SwitchedGap()
    modes = [
        (diagnostic._other.optimizers[0].mode, values["gap_switched"])
        for _, _, values, *_ in observed(diagnostic, method, steps=10)
    ]
    other = "adapter" if mode == "optimizer" else "optimizer"
    assert [one for one, _ in modes] == [mode] * 4 + [other] * 3 + [mode] * 3
    assert all(gap <= 1e-12 for _, gap in modes)


def test_the_control_is_the_run_with_its_rows_reversed():
    """Its gap is that of rounding alone; where the loss depends on the order of the rows, it is not."""
    method = Lingrad("svd(rank=3, every=3)", "adamw", "optimizer", {"lr": 1e-2})
    # dropout's mask stays where it is, so that other rows meet it: a real difference
    assert max(values["gap_control"] for _, _, values, *_ in observed(RowOrderGap(), method)) > 1e-4
    task = Dropped()
    plain = task.build(1, torch.float64).eval()
    batch = {"a": torch.arange(6.0).view(3, 2), "b": (torch.arange(3), torch.tensor(7))}
    turned = RowOrderGap().batch(batch)
    assert turned["a"].tolist() == [[4, 5], [2, 3], [0, 1]]
    assert turned["b"][0].tolist() == [2, 1, 0]
    assert turned["b"][1] == 7
    rows = torch.randn(12, SIZES[0], dtype=torch.float64)
    torch.testing.assert_close(task.loss(plain, RowOrderGap().batch(rows)), task.loss(plain, rows), rtol=1e-14, atol=0)


def test_a_gap_to_what_is_not_a_number_is_none():
    """A weight of NaN among good ones is not passed over: no run that broke looks equal."""
    one, broken = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    for a, b in ((one, broken), (broken, one)):
        assert math.isnan(largest_gap_of({"a": a, "b": one}, {"a": b, "b": one}))


def test_what_has_too_few_steps_or_no_rows_is_not_measured():
    method = Lingrad("svd(rank=3)", "adamw", "optimizer", {"lr": 1e-2})
    assert [values for _, _, values, *_ in observed(SwitchedGap(), method, steps=2)] == [{}, {}]
    assert any(values for _, _, values, *_ in observed(SwitchedGap(), method, steps=3))
    control = RowOrderGap()
    control._other = object()
    assert torch.equal(control.batch(torch.arange(3)), torch.arange(3))
    assert control._other is None
    weights, rows = torch.arange(2), torch.arange(6).view(3, 2)
    turned = RowOrderGap().batch({"weights": weights, "rows": rows})  # those of classes have no rows
    assert turned["weights"].tolist() == [0, 1]
    assert turned["rows"].tolist() == [[4, 5], [2, 3], [0, 1]]


def test_a_gap_between_zeros_is_zero():
    zero, one = torch.zeros(3), torch.ones(3)
    assert largest_gap_of({"a": zero}, {"a": zero}) == 0
    assert largest_gap_of({"a": one, "b": zero}, {"a": 2 * one, "b": zero}) == 0.5


OWN = """
from lingrad.research import Diagnostic

class Largest(Diagnostic):
    def after(self, step):
        if step != self.run.steps:
            return {}
        return {"NAME": max(p.detach().abs().max() for p in self.run.model.parameters())}

class Needs(Largest):
    def __init__(self, what):
        pass
"""


@pytest.mark.parametrize("name", ["largest", "loss"])
def test_one_of_a_users_own(tmp_path, name):
    (tmp_path / "own.py").write_text(OWN.replace("NAME", name))
    made = plan()
    object.__setattr__(made, "folder", tmp_path)
    object.__setattr__(made, "diagnostics", ("own.py:Largest",))
    (tmp_path / "out").mkdir()
    if name == "loss":
        with pytest.raises(SpecError, match="a diagnostic measures 'loss', which the run or another one measures too"):
            train(made, WAYS[0], seed=1, part="final", out=tmp_path / "out")
        return
    train(made, WAYS[0], seed=1, part="final", out=tmp_path / "out")
    lines = measured(tmp_path / "out")
    assert [name in line for line in lines] == [False] * 7 + [True]
    assert isinstance(lines[-1][name], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlaps", "there is no diagnostic 'overlaps'; did you mean 'overlap'? Known: energy, overlap, reproducible, rank, "),
        (3, "a diagnostic must be a text, not 3"),
        ("reproducible(threshold=2)", "threshold of the diagnostic 'reproducible' must be between 0 and 1, not 2"),
        ("rank(at=2)", "the diagnostic 'rank(at=2)' cannot be made: TypeError: UpdateRank() takes no arguments"),
        ("own.py:OWN", "own.py has no 'OWN'"),
        ("own.py:Diagnostics", "own.py has no 'Diagnostics'; did you mean 'Diagnostic'?"),
        ("own.py:Needs", "the diagnostic 'own.py:Needs' cannot be made: TypeError: Needs.__init__() missing"),
        ("own.py:Path", "'own.py:Path' is no diagnostic: it must be a class derived from lingrad.research.Diagnostic"),
    ],
)
def test_what_is_no_diagnostic(tmp_path, text, message):
    (tmp_path / "own.py").write_text(OWN + "\nfrom pathlib import Path\n")
    with pytest.raises(SpecError) as caught:
        make_diagnostic(text, tmp_path)
    assert str(caught.value).startswith(message)


def test_a_plan_names_each_once():
    with pytest.raises(SpecError, match="'diagnostics' names one of them twice; leave it out once"):
        plan("rank", "rank")
    assert make_plan(plan("rank").content, "plan.toml", Path()).diagnostics == ("rank",)
