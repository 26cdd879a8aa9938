"""The learning rate range test: what it finds on a quadratic, and that the run is then as if it had not taken place."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import DataError, ModeError, SpecError
from lingrad.research.rates import RateTest
from tests.support.models import llama
from tests.support.runs import MODES, assert_equal_bits, each_mode


class Small(nn.Module):
    """A model with what a state_dict may and may not have: statistics, a buffer that is not persistent, random numbers."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.to(dtype)

    def forward(self, x):
        self.calls += 1
        return self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.2, self.training))


class Training:
    """A model, its run, and a step that takes the batches in turn."""

    def __init__(self, mode, rules="svd(rank=3, every=3)", base="adamw", *, dtype=torch.float64, **options):
        self.model = Small(dtype)
        self.opt = MODES[mode](self.model, rules, base, **{"lr": 1e-2, **options})
        self.dtype, self.taken = dtype, 0

    def step(self):
        generator = torch.Generator().manual_seed(100 + self.taken)
        x, y = (torch.randn(7, size, generator=generator).to(self.dtype) for size in (6, 5))
        self.taken += 1
        self.opt.zero_grad()
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        self.opt.step()
        return loss

    def steps(self, count):
        for _ in range(count):
            self.step()
        return self

    def everything(self):
        found = {"random": torch.get_rng_state(), **self.model.state_dict(), **dict(self.model.named_buffers())}
        found |= {f"effective {name}": weight for name, weight in self.opt.weights().items()}
        state = self.opt.state_dict()
        for index, entries in state["state"].items():
            found |= {f"{index} {key}": value for key, value in entries.items()}
        for i, group in enumerate(state["param_groups"]):
            found |= {f"group {i} {key}": value for key, value in group.items()}
        return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    tensors = [{k: v for k, v in each.items() if isinstance(v, torch.Tensor)} for each in (a, b)]
    assert_equal_bits(*tensors)
    assert {k: v for k, v in a.items() if k not in tensors[0]} == {k: v for k, v in b.items() if k not in tensors[1]}


RUNS = {
    "svd": {"rest_lr": 1e-3, "weight_decay": 0.1},
    "moments carried": {"carry": "rotate", "ledger": True},
    "a sketch": {"rules": "power(rank=3, every=2)"},
    "drawn": {"rules": "random(rank=2, every=2, store=false)", "base": "sgd", "momentum": 0.9},
    "a schedule": {"rules": "svd(rank=2, every=2, schedule=energy)"},
    "the weight": {"rules": {"first": "weight(rank=2, every=2)", "last": "full()", "*": "frozen"}},
    "8-bit moments": {"moments": "8bit", "dtype": torch.float32},
    "rounded": {"rounding": "stochastic", "dtype": torch.bfloat16},
    "staggered": {"stagger": True, "scale": "norm"},
    "in the backward": {"layerwise": True},
    "galore": {"compat": "galore", "weight_decay": 0.1},
    "a tensor": {"lr": torch.tensor(1e-2)},
}
OF_A_MODE = {
    "a residual": {"residual": "feedback", "rules": "power(rank=2, every=1)", "carry": "transport"},
    "scaled": {"residual": "scaled"},
    "sampled": {"residual": "sampled(q=0.5)", "rules": "svd(rank=3, every=2)"},
    "W and z apart": {"self_contained": False},
    "merged often": {"merge_every": 2},
}
CASES = [(mode, name) for name in RUNS for mode in MODES]
CASES += [(("adapter", "optimizer")["residual" in options], name) for name, options in OF_A_MODE.items()]


class TestTheRunIsAsBefore:
    @pytest.mark.parametrize("steps", [0, 4])
    @pytest.mark.parametrize(("mode", "name"), CASES, ids=lambda value: value.replace(" ", "_"))
    @pytest.mark.thinned(3)
    def test_state_and_next_steps(self, mode, name, steps):
        options = {**RUNS, **OF_A_MODE}[name]
        torch.manual_seed(3)
        run = Training(mode, **options).steps(steps)
        torch.manual_seed(5)
        before = run.everything()
        found = lingrad.find_lr(run.opt, run.step, low=1e-5, high=0.3, steps=5)
        assert len(found.rates) == 5
        assert run.taken == steps + 5  # the data is the caller's
        assert_same(run.everything(), before)
        run.taken = steps
        run.steps(4)

        torch.manual_seed(3)
        other = Training(mode, **options).steps(steps)
        torch.manual_seed(5)
        other.steps(4)
        assert_same(run.everything(), other.everything())

    @each_mode
    @pytest.mark.parametrize("where", ["forward", "base", "after"])
    def test_where_the_step_raises(self, mode, where, monkeypatch):
        torch.manual_seed(5)
        run = Training(mode, carry="rotate").steps(4)
        before, calls = run.everything(), []

        def interrupted(*_):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt

        def step():
            loss = run.step()
            if where == "after":
                interrupted()
            return loss

        if where == "forward":
            hook = run.model.norm.register_forward_hook(interrupted)
        elif where == "base":  # coordinates have moved and are not merged
            hook = run.opt.base.register_step_post_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            lingrad.find_lr(run.opt, step, steps=9)
        if where != "after":
            hook.remove()
        assert_same(run.everything(), before)
        run.taken = 4
        run.steps(3)
        torch.manual_seed(5)
        other = Training(mode, carry="rotate").steps(4)
        torch.set_rng_state(before["random"])
        assert_equal_bits(run.opt.weights(), other.steps(3).opt.weights())

    def test_of_parameters_without_a_model(self):
        model = Small(torch.float64)
        opt = lingrad.wrap(model.named_parameters(), "svd(rank=2, every=2)", lr=1e-2)

        def step():
            opt.zero_grad()
            loss = model(torch.ones(3, 6, dtype=torch.float64)).square().mean()
            loss.backward()
            opt.step()
            return loss

        step()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        lingrad.find_lr(opt, step, steps=4, high=0.1)
        assert_equal_bits(dict(model.named_parameters()), before)

    @each_mode
    def test_groups_keep_their_ratios(self, mode):
        run = Training(mode, lr=1e-2, rest_lr=2e-3)
        seen = []

        def step():
            seen.append([group["lr"] for group in run.opt.param_groups])
            return run.step()

        found = lingrad.find_lr(run.opt, step, low=1e-4, high=1e-2, steps=3)
        assert found.rates == pytest.approx([1e-4, 1e-3, 1e-2], rel=1e-12)
        assert [rates[0] for rates in seen] == found.rates
        # coordinates, then what trains in full, a fifth of that
        assert all(rate == pytest.approx(0.2 * rates[0], rel=1e-12) for rates in seen for rate in rates[1:])
        assert [group["lr"] for group in run.opt.param_groups] == [1e-2] + [2e-3] * (len(seen[0]) - 1)

    def test_a_schedule_that_starts_at_zero(self):
        run = Training("optimizer", lr=1e-2, rest_lr=1e-3)
        torch.optim.lr_scheduler.LambdaLR(run.opt, lambda step: step / 10)
        assert run.opt.param_groups[0]["lr"] == 0.0
        lingrad.find_lr(run.opt, run.step, steps=3, high=0.1)
        assert run.opt.param_groups[0]["lr"] == 0.0

    def test_a_learning_rate_that_is_a_tensor_stays_that_tensor(self):
        run = Training("optimizer", lr=torch.tensor(1e-2))
        lr = run.opt.param_groups[0]["lr"]
        lingrad.find_lr(run.opt, run.step, steps=3, high=0.1)
        assert run.opt.param_groups[0]["lr"] is lr
        assert torch.equal(lr, torch.tensor(1e-2))


class TestWhatItFinds:
    CURVATURES = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)

    def quadratic(self, mode):
        """loss = sum_j h_j / 2 |column j of W - W*|^2: a step of SGD multiplies each column by 1 - lr h_j.

        The best constant rate is 2 / (4 + 0.5), the largest that does not diverge 2 / 4.
        """
        torch.manual_seed(0)
        layer = nn.Linear(4, 4, bias=False).double()
        best = torch.randn(4, 4, dtype=torch.float64)
        x = self.CURVATURES.sqrt().diag()
        opt = MODES[mode](nn.Sequential(layer), {"*": "full()"}, "sgd", lr=1e-3)

        def step():
            opt.zero_grad()
            loss = (layer(x) - x @ best.t()).square().sum() / 2
            loss.backward()
            opt.step()
            return loss

        return opt, step, (layer.weight.detach() - best).square().sum(0)

    @each_mode
    def test_on_a_quadratic(self, mode):
        opt, step, distances = self.quadratic(mode)
        found = lingrad.find_lr(opt, step, low=1e-6, high=100.0, steps=100)
        expected, smoothed, average = [], [], 0.0
        for i, rate in enumerate(found.rates, 1):
            expected.append(float(self.CURVATURES @ distances) / 2)
            distances = distances * (1 - rate * self.CURVATURES) ** 2
            average = 0.9 * average + 0.1 * expected[-1]
            smoothed.append(average / (1 - 0.9**i))
        # rounding of W, 1e-16, is relative to a distance of 1 that shrinks to about 1e-2 before it grows again
        assert found.losses == pytest.approx(expected, rel=1e-10)
        assert found.smoothed == pytest.approx(smoothed, rel=1e-10)
        assert found.ended == "diverged"
        assert found.smoothed[-1] > 4 * min(found.smoothed)
        assert all(one <= 4 * min(found.smoothed[: i + 1]) for i, one in enumerate(found.smoothed[:-1]))
        assert found.suggestion == found.lowest / 10
        best = 2 / (4 + 0.5)
        assert best / 10 < found.suggestion < best
        assert f"Suggested: {found.suggestion:.3g}, a tenth of {found.lowest:.3g}" in found.why

    def run(self, losses, **options):
        """A test whose steps return these losses."""
        run, given = Training("optimizer"), iter(losses)

        def step():
            run.step()
            return next(given)

        return lingrad.find_lr(run.opt, step, low=1e-3, high=1.0, steps=4, smoothing=0.0, **options)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(math.nan)], ids=["nan", "inf", "tensor"])
    def test_a_loss_that_is_not_finite_ends_it(self, bad):
        found = self.run([3.0, 2.0, bad])
        assert (found.ended, found.losses) == ("not finite", [3.0, 2.0])
        assert found.suggestion == pytest.approx(1e-3)
        assert found.why.startswith("The loss was not finite at 0.1. Suggested: 0.001, a tenth of 0.01, where ")
        json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(name))

    @pytest.mark.parametrize(("losses", "ended"), [([1.0, 4.1], 2), ([-1.0, 1.9, 2.1], 3), ([0.5, 2.0, 1.0, 0.1], 4)])
    def test_the_bound_is_of_the_size_of_the_lowest_loss(self, losses, ended):
        found = self.run(losses)
        assert len(found.losses) == ended
        assert found.ended == ("high" if ended == 4 else "diverged")

    def test_a_smaller_bound(self):
        assert self.run([3.0, 2.0, 2.3], bound=1.1).ended == "diverged"

    @pytest.mark.parametrize(
        ("losses", "message"),
        [
            ([4.0, 3.0, 2.0, 1.0], "All steps were taken, up to 1. No suggestion: the loss was still falling; try a larger"),
            ([1.0, 2.0, 3.0, 4.0], "All steps were taken, up to 1. No suggestion: the loss never fell; try a smaller `low`"),
            ([math.nan], "The loss was not finite at 0.001. No suggestion: the first loss was not finite"),
        ],
        ids=["falling", "rising", "nan"],
    )
    def test_no_suggestion_where_there_is_no_minimum(self, losses, message):
        found = self.run(losses)
        assert found.suggestion is None
        assert found.why.startswith(message)
        assert found.why in str(found)

    def test_the_table_leaves_rows_out_and_not_the_ends(self):
        rates = [10.0**-i for i in range(50, 0, -1)]
        found = RateTest(rates, [2.0] * 50, [1.5] * 50, "high", 0.1)
        header, *rows = found.table(lines=8)
        assert header == ("rate", "loss", "smoothed")
        assert (len(rows), rows[0], rows[-1]) == (8, ("1e-50", "2", "1.5"), ("0.1", "2", "1.5"))
        assert RateTest([], [], [], "not finite", 1.0).table() == [header]

    def test_plot(self, tmp_path):
        for found in (self.run([3.0, 2.0, 30.0]), self.run([math.nan])):
            path = found.plot(tmp_path / "plot.png")
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/which-method.md").read_text().split("### A range test")[1]
    code = (
        page.split("```python\n")[1]
        .split("```")[0]
        .replace("rank=64", "rank=4")
        .replace("steps=100", "steps=20")
        .replace("high=1.0", "high=1e3")
    )
    ids = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(0))
    batches = iter([{"input_ids": ids, "labels": ids}] * 20)
    names = {"lingrad": lingrad, "model": llama(torch.float32), "batches": batches}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/which-method.md", "exec"), names)  # noqa: S102 - our own text
    coords, *rest = (group["lr"] for group in names["opt"].param_groups)
    assert coords == pytest.approx(names["found"].suggestion)
    assert rest == pytest.approx([coords / 10] * len(rest))
    assert (tmp_path / "find-lr.png").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("low", 0.0, "low must be a learning rate above 0, not 0.0"),
            ("low", "1e-3", "low must be a learning rate above 0"),
            ("high", 1e-7, "high must be a learning rate above low = 1e-07"),
            ("high", math.inf, "high must be a learning rate above low"),
            ("steps", 1, "steps must be a whole number from 2, not 1"),
            ("smoothing", 1.0, "smoothing must be from 0 to below 1"),
            ("bound", 1.0, "bound must be above 1"),
        ],
    )
    def test_options(self, option, value, message):
        run = Training("optimizer")
        with pytest.raises(SpecError, match=message):
            lingrad.find_lr(run.opt, run.step, **{option: value})
        assert run.taken == 0

    def test_what_is_no_run_and_no_step(self):
        run = Training("optimizer")
        with pytest.raises(SpecError, match=r"expected the optimizer of lingrad.wrap or lingrad.adapt, not a Linear"):
            lingrad.find_lr(nn.Linear(2, 2), run.step)
        with pytest.raises(SpecError, match="step must be a function that trains on one batch and returns the loss, not None"):
            lingrad.find_lr(run.opt, None)
        run.opt.detach()
        with pytest.raises(ModeError, match="this optimizer was detached"):
            lingrad.find_lr(run.opt, run.step)

    @pytest.mark.parametrize("loss", [None, torch.ones(2), "1"], ids=["none", "two", "text"])
    def test_a_step_without_a_loss(self, loss):
        run = Training("optimizer")
        with pytest.raises(SpecError, match=r"step\(\) must return the loss, a number or a tensor of one element, not "):
            lingrad.find_lr(run.opt, lambda: (run.step(), loss)[1])

    def test_a_step_with_a_scheduler(self):
        run = Training("optimizer")
        scheduler = torch.optim.lr_scheduler.ExponentialLR(run.opt, 0.9)
        before = run.everything()
        with pytest.raises(SpecError, match=r"step\(\) changed the learning rate, .* leave the scheduler out of it"):
            lingrad.find_lr(run.opt, lambda: (run.step(), scheduler.step())[0])
        assert_same(run.everything(), before)

    def test_a_step_that_does_not_step(self):
        run = Training("optimizer")
        with pytest.raises(SpecError, match=r"step\(\) never called opt.step\(\)"):
            lingrad.find_lr(run.opt, lambda: 1.0, steps=2)

    def test_a_learning_rate_of_zero(self):
        run = Training("optimizer", lr=0.0)
        with pytest.raises(ModeError, match="the learning rate of group 'coords' is 0.0, .* above 0, such as lr=1e-3"):
            lingrad.find_lr(run.opt, run.step)


class TestTheCommand:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        from lingrad.research import commands

        monkeypatch.setattr(commands, "SMALL", {"rows": 2, "hidden": 32, "layers": 1})

    def arguments(self, folder, *more):
        text = folder / "mine.txt"
        text.write_text("to be, or not to be, that is the question: " * 40)
        rules = ("--rules", "svd(rank=4, every=5)", "--length", "8", "--out", folder / "out")
        return ("find-lr", "--text", text, *rules, *more)

    @pytest.mark.thinned(9)
    @pytest.mark.parametrize("mode", MODES)
    def test_it_prints_a_table_and_writes_the_files(self, lingrad, tmp_path, mode):
        status, out, errors = lingrad(*self.arguments(tmp_path, "--steps", "12", "--low", "1e-4", "--mode", mode))
        assert status == 0, errors
        found = json.loads((tmp_path / "out/find-lr.json").read_text())
        assert found["rates"][0] == 1e-4
        assert found["losses"][0] == pytest.approx(math.log(256), abs=0.2)  # a fresh model of 256 tokens
        assert out.splitlines()[0].split() == ["rate", "loss", "smoothed"]
        assert found["why"] in out
        assert (tmp_path / "out/find-lr.png").read_bytes().startswith(b"\x89PNG")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"find-lr.json", "find-lr.png"}

    def test_json_alone(self, lingrad, tmp_path):
        status, out, _ = lingrad(*self.arguments(tmp_path, "--steps", "2", "--json", "-"))
        assert status == 0
        assert json.loads(out) == json.loads((tmp_path / "out/find-lr.json").read_text())

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--mode", "both"), "mode must be one of optimizer, adapter, not 'both'"),
            (("--low", "0"), "low must be a learning rate above 0"),
            (("--high", "1e-9"), "high must be a learning rate above low"),
        ],
    )
    def test_wrong_arguments(self, lingrad, tmp_path, more, message):
        status, _, errors = lingrad(*self.arguments(tmp_path, *more))
        assert status == 2
        assert message in errors

    def test_a_file_that_cannot_be_written(self, tmp_path, monkeypatch):
        from lingrad.research import commands

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(commands, "write_whole", full)
        text = tmp_path / "mine.txt"
        text.write_text("to be, or not to be, that is the question: " * 40)
        options = {"base": "adamw", "mode": "adapter", "scale": 1.0, "carry": "keep", "length": 8}
        with pytest.raises(DataError, match="cannot write the results to .*: No space left on device"):
            commands.find_lr(text, "svd(rank=4)", tmp_path, **options, low=1e-3, high=1e-2, steps=2)
