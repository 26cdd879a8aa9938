"""What a schedule adds to a run: its memory, captured steps, experts, adapters of others, what it says; and its figures."""

import pytest
import torch

import lingrad
from lingrad import memory
from lingrad.config import spec
from lingrad.engine.adaptive import overlap_of
from lingrad.maps import KroneckerMap, SelectionMap
from lingrad.testing.training import every_kind, token_batches, token_loss
from lingrad.transforms import SVD, EnergySchedule, OverlapSchedule, PathSchedule, Power
from tests.engine.test_capture import Run
from tests.support.models import gap, train
from tests.support.runs import MODES, each_mode, weights_of
from tests.transforms.test_experts import Routed

pytestmark = pytest.mark.thinned(3)

STRINGS = {
    "svd(rank=8, schedule=energy())": SVD(rank=8, schedule=EnergySchedule()),
    "svd(rank=8, schedule=energy(fraction=0.5, least=0.25))": SVD(rank=8, schedule=EnergySchedule(fraction=0.5, least=0.25)),
    "power(rank=8, every=50, schedule=overlap(after=2, longest=400))": Power(
        rank=8, every=50, schedule=OverlapSchedule(after=2, longest=400)
    ),
    "power(rank=8, schedule=path(threshold=0.01, measure=displacement))": Power(
        rank=8, schedule=PathSchedule(threshold=0.01, measure="displacement")
    ),
}


@pytest.mark.parametrize("text", STRINGS)
def test_a_string_is_its_object(text):
    assert spec.parse(text) == STRINGS[text]
    assert spec.format(STRINGS[text]) == text


def test_spellings():
    assert spec.parse("svd(rank=8, schedule=path)") == SVD(rank=8, schedule=PathSchedule())
    assert spec.parse("svd(rank=8, schedule=path(threshold=1))") == SVD(rank=8, schedule=PathSchedule(threshold=1.0))
    assert spec.format(spec.parse("svd(rank=8, schedule=none)")) == "svd(rank=8)"
    assert spec.parse("experts(each=svd(rank=8, schedule=path))").rule == PathSchedule()


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("text", ["svd(rank=4, {})", "power(rank=4, side=both, {})", "svd(rank=4, solver=randomized, {})"])
@pytest.mark.parametrize("rule", ["energy", "overlap", "path", "path(measure=displacement)"])
def test_the_estimate_counts_what_a_run_holds(mode, dtype, text, rule):
    rules = {"head": "none", "*": text.format(f"schedule={rule}")}

    def loss(model):
        return token_loss(model, torch.zeros(4, 5, dtype=torch.long, device="meta"))

    simulated = memory.simulate(lambda: every_kind(dtype), rules, "adamw", mode, loss=loss, lr=1e-2)
    with torch.device("meta"):
        model = every_kind(dtype)
    estimate = memory.estimate(model, rules, "adamw", mode, lr=1e-2)
    assert estimate.totals == simulated.steady_breakdown
    plain = memory.estimate(model, {"head": "none", "*": text.format("every=200")}, "adamw", mode, lr=1e-2).totals["basis"]
    assert (estimate.totals["basis"] > plain) == ("path" in rule)


@each_mode
@pytest.mark.parametrize("transform", ["svd", "power"])
@pytest.mark.parametrize(
    "rule", ["path(threshold=0.35)", "path(threshold=0.2, measure=displacement)", "overlap(threshold=0.3, after=1)"]
)
def test_captured_steps_add_up_as_ordinary_ones(mode, transform, rule):
    text = f"{transform}(rank=4, every=5, schedule={rule})"
    plain, graphed = (Run(mode, text, weight_decay=0.1) for _ in range(2))
    captured = graphed.captured()
    draws = torch.randint(0, 64, (31, 2, 8), generator=torch.Generator().manual_seed(5))
    for ids in draws:
        for run in (plain, graphed):
            run.ids.copy_(ids)
        assert torch.equal(captured(), plain.step())
    assert captured.replays > 8
    assert graphed.optimizer.refreshes() == plain.optimizer.refreshes()
    assert len(set(plain.optimizer.refreshes().values())) > 1 or max(plain.optimizer.refreshes().values()) < 7
    for name, weight in plain.optimizer.weights().items():
        assert torch.equal(weight, graphed.optimizer.weights()[name])


def test_a_graph_is_recorded_once_where_no_check_refreshes():
    run = Run("optimizer", "svd(rank=4, every=5, schedule=path(threshold=0.0001))")
    captured = run.captured()
    for _ in range(31):
        captured()
    assert (captured.captures, captured.replays) == (1, 27)


@pytest.mark.parametrize("each", ["svd(rank=2, every=2, schedule={})", "power(rank=2, every=2, schedule={})"])
@pytest.mark.parametrize("rule", ["path(threshold=0.75)", "path(threshold=0.4, measure=displacement)"])
def test_experts_decide_together(each, rule):
    ends, counts = [], []
    for mode in MODES:
        model = Routed()
        optimizer = MODES[mode](model, {"experts*": f"experts(each={each.format(rule)})", "*": "none"}, lr=1e-2)
        train(model, optimizer, token_batches(16), token_loss, schedule=False)
        ends.append(weights_of(optimizer))
        counts.append(optimizer.refreshes())
    assert gap(*ends) <= 1e-12
    assert counts[0] == counts[1]
    assert 1 < next(iter(counts[0].values())) < 8


class TestOverlap:
    def bases(self, columns, seed=0):
        drawn = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return torch.linalg.qr(drawn)[0][:, columns]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_of_one_side(self, side):
        one, other = self.bases(slice(0, 4)), self.bases(slice(2, 6))
        maps = [KroneckerMap(b, None) if side == "left" else KroneckerMap(None, b) for b in (one, other)]
        ranks = (4, None) if side == "left" else (None, 4)
        assert float(overlap_of(*maps, ranks, one)) == pytest.approx(0.5)

    def test_of_two_sides(self):
        old = KroneckerMap(self.bases(slice(0, 4)), self.bases(slice(0, 6), 1))
        new = KroneckerMap(self.bases(slice(1, 5)), self.bases(slice(3, 9), 1))
        assert float(overlap_of(old, new, (4, 6), old.left)) == pytest.approx(3 / 4 * 3 / 6)

    def test_of_rows(self):
        old, new = (SelectionMap(torch.tensor(rows), None, (9, 5)) for rows in ([0, 1, 2], [1, 2, 8]))
        assert float(overlap_of(old, new, (3, None), torch.zeros(()))) == pytest.approx(2 / 3)


def test_it_is_said():
    model = every_kind(torch.float32)
    text = "svd(rank=4, every=20, schedule=path(threshold=0.3))"
    assert text in str(lingrad.explain(model, {"*": text}))


class TestNextRefreshes:
    def run(self, text, steps, **options):
        run = Run("optimizer", text, **options)
        for _ in range(steps):
            run.step()
        return set(run.optimizer.next_refreshes().values())

    @pytest.mark.parametrize(
        ("text", "steps", "expected"),
        [
            ("svd(rank=4, every=5)", 0, {(0, 5, True)}),
            ("svd(rank=4, every=5)", 1, {(5, 5, True)}),
            ("svd(rank=4, every=5)", 5, {(5, 5, True)}),
            ("svd(rank=4, every=1500)", 1, {(1500, 1500, True)}),
            ("svd(rank=4, every=0)", 1, set()),
            ("random(rank=4, every=5)", 0, {(5, 5, True)}),
            ("svd(rank=4, every=5, schedule=energy)", 0, {(0, 5, True)}),
            ("svd(rank=4, every=5, schedule=energy)", 3, {(5, 5, False)}),
            ("svd(rank=4, every=5, schedule=energy)", 5, {(5, 5, False)}),
            ("svd(rank=4, every=5, schedule=overlap(threshold=0.0001, after=1))", 3, {(5, 5, True)}),
            ("svd(rank=4, every=5, schedule=overlap(threshold=0.0001, after=1))", 6, {(15, 10, True)}),
            ("svd(rank=4, every=5, schedule=overlap(threshold=0.0001, after=1))", 16, {(35, 20, True)}),
            ("svd(rank=4, every=5, schedule=path(threshold=1.0))", 4, {(5, 5, False)}),
            ("svd(rank=4, every=5, schedule=path(threshold=1.0))", 5, {(5, 5, True)}),
            ("svd(rank=4, every=5, schedule=path(threshold=0.0001))", 5, {(10, 5, False)}),
        ],
    )
    def test_it_is_when_something_happens(self, text, steps, expected):
        assert self.run(text, steps) == expected

    def test_in_turns(self):
        found = sorted(self.run("svd(rank=4, every=7, schedule=path)", 0, stagger=True))
        assert found == [(step, 7, True) for step in range(7)]
