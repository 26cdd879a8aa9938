"""One run of a plan: when it ends, and what progress says of the others."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lingrad.errors import SpecError
from lingrad.research.plan import make_plan
from lingrad.research.progress import time_left
from lingrad.research.task import Task
from lingrad.research.training import METRICS, steps_for, train
from lingrad.research.ways import make_method
from tests.research.test_execution import TASK


@dataclass(frozen=True)
class Lengths(Task):
    lengths: list = field(default_factory=lambda: [3, 5, 2, 4])
    most: int = 10**6

    def build(self, seed, dtype):
        return nn.Linear(1, 1)

    def batches(self, steps, seed):
        for i in range(min(steps, self.most)):
            yield torch.zeros(self.lengths[i % len(self.lengths)])

    def judge(self, model, part):
        return {}


@pytest.mark.parametrize(("tokens", "steps"), [(4, 2), (8, 2), (9, 3), (10, 3), (14, 4), (15, 5), (1400, 400), (1401, 401)])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(tokens, steps):
    assert steps_for(Lengths(), tokens, 0) == steps


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Lengths([9]), "a budget of 8 tokens is one batch, of 9; expected two batches or more"),
        (Lengths([0]), "the task gave 1 batches with 0 tokens, where a budget of 8 tokens was asked for"),
        (Lengths([1], most=5), "the task gave 5 batches with 5 tokens, where a budget of 8 tokens was asked for"),
    ],
    ids=["one batch", "no tokens", "too few"],
)
def test_a_budget_that_cannot_be(task, message):
    with pytest.raises(SpecError) as caught:
        steps_for(task, 8, 0)
    assert str(caught.value) == message


def line_plan(folder, **changes):
    (folder / "line.py").write_text(TASK)
    content = {
        "name": "line",
        "task": {"kind": "line.py:Line", "steps": 4},
        "entries": [{"name": "svd", "method": "svd(rank=2, every=2)", "options": {"lr": 0.01}}],
        **changes,
    }
    return make_plan(content, "plan.toml", folder)


def trained(plan, out, seed=1, **options):
    out.mkdir()
    method = make_method(plan.entries[0], {}, seed=seed, folder=plan.folder)
    found = train(plan, method, seed=seed, part="tuning", out=out, **options)
    return found, [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_a_run_by_tokens_is_that_by_steps(tmp_path):
    by_steps, lines = trained(line_plan(tmp_path), tmp_path / "steps")
    by_tokens, same = trained(line_plan(tmp_path, task={"kind": "line.py:Line", "tokens": 3 * 48 + 1}), tmp_path / "tokens")
    assert by_tokens["steps"] == 4  # of 8 x 6 numbers each
    assert by_tokens["metrics"] == by_steps["metrics"]
    assert [line["lr"] for line in lines] == [line["lr"] for line in same]


@pytest.mark.parametrize(
    ("took", "left", "jobs", "text"),
    [
        ([], 3, 1, ""),
        ([1.0], 0, 1, ""),
        ([10.0, 12.0, 500.0], 4, 2, "about 24 s left"),
        ([60.0], 28, 2, "about 14 min left"),
        ([3600.0], 3, 1, "about 3.0 h left"),
    ],
)
def test_the_time_left(took, left, jobs, text):
    assert time_left(took, left, jobs) == text
