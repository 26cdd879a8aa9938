"""Pruned trials of whole plans; which trial is stopped depends on the order, so these run one at a time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lingrad.research import trial
from lingrad.research.execution import execute
from lingrad.research.pages import as_markdown
from lingrad.research.plan import make_plan, open_plan
from lingrad.research.record import RESULT
from lingrad.research.results import read_results, summarize
from lingrad.research.search import Trials, open_storage
from tests.research.test_execution import TASK, written

pytest.importorskip("optuna", reason="make test installs it (extra: research)")
LR = "[0.01, 0.02, 1e-7, 2e-7]"  # the last two hardly move


def pruned_plan(folder, pruner):
    path = written(folder, lr=LR, trials=4, seeds="[1]")
    text = path.read_text().replace("[search]", f'[search]\npruner = "{pruner}"\nrungs = 2').replace("steps = 4", "steps = 40")
    path.write_text(text[: text.rindex("[[entries]]")])  # one entry
    return path


def line(folder, **search):
    folder.mkdir(exist_ok=True)
    (folder / "line.py").write_text(TASK)
    content = {
        "name": "line",
        "task": {"kind": "line.py:Line", "steps": 8},
        "search": {"space": {"lr": [0.1, 0.2, 0.3, 0.4]}, **search},
        "entries": [{"name": "svd", "method": "svd(rank=2)"}],
    }
    return make_plan(content, "plan.toml", folder)


class TestVerdicts:
    """What is said at rungs, by hand."""

    @pytest.fixture
    def trials(self, tmp_path):
        def opened(pruner):
            plan = line(tmp_path / "plan", pruner=pruner)
            return Trials(plan, plan.entries[0], open_storage(tmp_path, None))

        return opened

    def test_median(self, trials):
        found = trials("median")
        for value in (3.0, 1.0):  # nothing is stopped before two have ended
            number, _ = found.take()
            assert not found.stops(number, 1, value)
            found.finish(number, value, "", {})
        third, _ = found.take()
        assert found.stops(third, 1, 2.5)  # the median of 3 and 1 is 2
        found.finish(third, None, "pruned", {"took": 1.0})
        fourth, _ = found.take()
        assert not found.stops(fourth, 1, 1.5)
        found.finish(fourth, 1.5, "", {})
        assert found.done  # a pruned trial is one of the budget
        assert [one.value for one in found.outcomes()] == [3.0, 1.0, None, 1.5]
        assert found.chosen(greater=False).number == 1

    def test_halving(self, trials):
        found = trials("halving")
        numbers = [found.take()[0] for _ in range(4)]
        # the best so far goes on; a half of two, three and four are one, one and two
        assert [found.stops(n, 1, value) for n, value in zip(numbers, (2.0, 1.0, 3.0, 1.5), strict=True)] == [
            False,
            False,
            True,
            False,
        ]
        assert found.stops(numbers[0], 2, 2.0) is False  # alone at this rung
        assert found.stops(numbers[1], 2, 2.5) is True

    @pytest.mark.parametrize("pruner", ["median", "halving"])
    def test_what_was_said_of_a_trial_that_is_made_again_holds(self, trials, pruner):
        found = trials(pruner)
        for value in (1.0, 2.0):
            number, _ = found.take()
            found.stops(number, 1, value)
            found.finish(number, value, "", {})
        third, _ = found.take()
        assert found.stops(third, 1, 9.0)
        assert trials(pruner).stops(third, 1, 9.0)

    def test_a_trial_that_has_ended_and_is_made_again_is_not_judged_anew(self, trials):
        found = trials("median")
        number, _ = found.take()
        found.finish(number, None, "error", {})
        assert not found.stops(number, 1, 9.0)

    def test_none(self, trials):
        found = trials("none")
        assert not any(found.stops(found.take()[0], 1, value) for value in (1.0, 2.0, 3.0, 4.0))


def test_a_plan_with_a_pruner(tmp_path):
    """Halving, one at a time: of four learning rates the two that hardly move are stopped at the first rung."""
    execute(open_plan(pruned_plan(tmp_path / "plan", "halving")), tmp_path / "out")
    plan, runs = read_results([tmp_path / "out"])
    (one,) = summarize(plan, runs)
    slow = [run for run in one.trials if run.values["lr"] < 1e-3]
    assert [run.pruned for run in slow] == [True, True]
    assert {run.info["steps"] for run in slow} == {10}  # a quarter of 40
    assert len(one.trials) == 4
    text = as_markdown(plan, [one])
    assert "Failures" not in text
    assert "- svd, trial {'lr': 1e-07}: loss " in text
    path = next((tmp_path / "out").glob(f"runs/*/search-002/{RESULT}"))
    assert trial.main(str(path), str(tmp_path / "again")) == 0  # from its record: it stops there again
    again = json.loads((tmp_path / "again" / RESULT).read_text())
    assert again["train_info"]["metrics"] == json.loads(path.read_text())["train_info"]["metrics"]
    assert again["train_info"]["status"] == "pruned"


@pytest.mark.slow
def test_killed_and_started_again_the_same_are_pruned(tmp_path):
    path = pruned_plan(tmp_path / "plan", "halving")
    execute(open_plan(path), tmp_path / "whole")
    command = [sys.executable, "-m", "lingrad", "run", str(path), "--out", str(tmp_path / "out")]
    for moment in (6.0, 9.0):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    execute(open_plan(path), tmp_path / "out")
    found = [
        [(run.values, run.final, run.info["status"], run.info["metrics"]) for run in read_results([tmp_path / name])[1]]
        for name in ("whole", "out")
    ]
    assert found[0] == found[1]
