"""One run of a plan: when it ends, where it may be stopped, what of it several processes do; and the time left of others."""

import json
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import nn

from lingrad.errors import SpecError
from lingrad.research import processes
from lingrad.research.plan import make_plan
from lingrad.research.processes import rows_of
from lingrad.research.progress import time_left
from lingrad.research.pruning import Channel, rung_steps
from lingrad.research.task import Task, mapped, moved, tensors_of
from lingrad.research.tasks.chat import IGNORED, Chat, Example, pad
from lingrad.research.training import METRICS, steps_for, train
from lingrad.research.ways import make_method
from tests.research.test_execution import TASK
from tests.support.models import llama


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


class TestRungs:
    @pytest.mark.parametrize(
        ("steps", "rungs", "found"), [(80, 3, {10: 1, 20: 2, 40: 3}), (4, 3, {1: 2, 2: 3}), (2, 1, {1: 1}), (100, 1, {50: 1})]
    )
    def test_each_is_at_half_of_the_next_ones_steps(self, steps, rungs, found):
        assert rung_steps(steps, rungs) == found

    def test_a_run_that_is_judged_on_its_way_is_the_same_run(self, tmp_path):
        straight, _ = trained(line_plan(tmp_path), tmp_path / "straight")
        plan = line_plan(tmp_path, search={"pruner": "median", "rungs": 2})
        asked = []
        judged, lines = trained(plan, tmp_path / "judged", verdict=lambda *found: asked.append(found))
        assert [rung for rung, _ in asked] == [1, 2]
        assert [line.get("judged") for line in lines] == [asked[0][1], asked[1][1], None, None]
        assert judged["metrics"] == straight["metrics"]
        assert judged["stopped"] == 0

    def test_it_stops_where_it_is_told_to(self, tmp_path):
        plan = line_plan(tmp_path, search={"pruner": "halving", "rungs": 2})
        found, lines = trained(plan, tmp_path / "out", verdict=lambda rung, value: rung == 2)
        assert (found["stopped"], found["steps"], len(lines)) == (2, 2, 2)
        assert found["metrics"] == {"loss": lines[-1]["judged"]}


def test_question_and_answer_go_through_files(tmp_path):
    channel = Channel(tmp_path / ".search-000.1.job.json")
    said = []

    def answer(rung, value):
        said.append((rung, value))
        return rung == 2

    def serve():
        while len(said) < 2:
            channel.reply(answer)
            time.sleep(0.001)

    server = threading.Thread(target=serve)
    server.start()
    assert [channel.ask(1, 0.5), channel.ask(2, 0.25)] == [False, True]
    server.join()
    assert said == [(1, 0.5), (2, 0.25)]
    assert not list(tmp_path.iterdir())


class TestParts:
    def test_parts_of_a_batch_are_the_batch(self):
        batch = {"ids": torch.arange(12).view(4, 3), "more": [torch.arange(4), "text"]}
        parts = [rows_of(batch, number, 2) for number in (0, 1)]
        assert torch.equal(torch.cat([part["ids"] for part in parts]), batch["ids"])
        assert [part["more"][0].tolist() for part in parts] == [[0, 1], [2, 3]]
        assert parts[1]["more"][1] == "text"

    @pytest.mark.parametrize("tensor", [torch.zeros(3, 2), torch.tensor(1.0)], ids=["three rows", "none"])
    def test_what_cannot_be_cut(self, tensor):
        with pytest.raises(SpecError, match="in a batch cannot be cut for 2 processes; expected as many rows, or a multiple"):
            rows_of({"x": tensor}, 0, 2)

    def test_losses_of_unequal_parts_add_up(self, monkeypatch):
        """Of conversations, whose loss is a mean over the tokens of the assistant: float64, sums in another order."""
        examples = [Example([3, 4, 5, 6], [IGNORED, 4, 5, 6]), Example([7, 8, 9], [IGNORED, IGNORED, 9])]
        whole, model = pad(examples), llama()
        task = Chat("talk.jsonl", "./model")
        expected = task.loss(model, whole)
        monkeypatch.setattr(processes, "count", lambda: 2)
        found = []
        for number in (0, 1):
            monkeypatch.setattr(processes, "rank", lambda number=number: number)
            part, factor = processes.share(task, whole)
            found.append(factor * task.loss(model, part) / 2)
        assert float((sum(found) - expected).detach()) == pytest.approx(0.0, abs=1e-14)


def test_a_batch_keeps_its_kind_whatever_becomes_of_its_tensors():
    class Pair(NamedTuple):
        ids: torch.Tensor
        name: str

    one, two = torch.ones(2, 3), torch.zeros(2)
    batch = {"pair": Pair(one, "a"), "more": [two, (one, 3)]}
    changed = mapped(batch, lambda tensor: tensor + 1)
    assert type(changed["pair"]) is Pair
    assert changed["pair"].name == "a"
    assert torch.equal(changed["pair"].ids, one + 1)
    assert torch.equal(changed["more"][0], two + 1)
    assert type(changed["more"][1]) is tuple
    assert changed["more"][1][1] == 3
    assert [tensor.shape for tensor in tensors_of(batch)] == [(2, 3), (2,), (2, 3)]
    assert [tensor.device.type for tensor in tensors_of(moved(batch, "meta"))] == ["meta"] * 3
