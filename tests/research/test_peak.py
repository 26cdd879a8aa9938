"""The simulated peak of a run is that of its own model, method and batch; its results are those of its own data."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lingrad.errors import DataError
from lingrad.memory import simulate
from lingrad.methods import Lingrad, baseline
from lingrad.models import next_token_loss
from lingrad.research.execution import _claim, execute
from lingrad.research.peak import PEAK, add_peaks, simulated_peak, skeleton
from lingrad.research.plan import make_plan
from lingrad.research.task import Task
from lingrad.research.tasks.text import Text

TASK = Text(rows=2, length=16, hidden=32, layers=1, held=4)
WAYS = {
    "svd": lambda: Lingrad("svd(rank=4)", "adamw", "optimizer", {"lr": 1e-3}),
    "adapter": lambda: Lingrad("random(rank=4)", "adamw", "adapter", {"lr": 1e-3}),
    "adamw": lambda: baseline("adamw", lr=1e-3),
    "lora": lambda: baseline("lora", rank=4, lr=1e-3),
    "apollo": lambda: baseline("apollo", rank=4, lr=1e-3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_a_model_built_on_the_meta_device_takes(way, dtype):
    batch = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    expected = simulate(lambda: TASK.build(0, dtype), WAYS[way](), loss=lambda model: next_token_loss(model, batch))
    assert simulated_peak(TASK, WAYS[way](), simulate, dtype=dtype, seed=1) == expected.peak > 0


def test_a_skeleton_takes_no_memory_and_shares_what_was_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    bare = skeleton(model)
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert bare[1].weight is bare[0].weight
    assert {name: p.requires_grad for name, p in bare.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }


def test_other_data_are_another_study(tmp_path):
    """Of a file the content counts, of a folder the files; results are never taken for those of other data."""
    (tmp_path / "book.txt").write_text("call me ishmael. " * 400)
    task = {"kind": "text", "data": "book.txt", "steps": 2, "rows": 2, "length": 8, "hidden": 32, "layers": 1, "held": 4}
    plan = make_plan({"name": "n", "task": task, "entries": [{"name": "a", "baseline": "adamw"}]}, "a plan", tmp_path)
    _claim(plan, tmp_path / "out")
    _claim(plan, tmp_path / "out")
    (tmp_path / "book.txt").write_text("to be, or not to be. " * 400)
    with pytest.raises(DataError, match="another plan, or of this one before its options, code or data were changed"):
        _claim(plan, tmp_path / "out")
    claim = json.loads((tmp_path / "out/plan.json").read_text())
    assert list(claim["files"]) == ["data"]
    (tmp_path / "out/plan.json").write_text(json.dumps({key: claim[key] for key in claim if key != "files"}))
    _claim(plan, tmp_path / "out")  # of an earlier version, or published: what it has read is not known


@dataclass(frozen=True)
class Reading(Task):
    """A loss whose shapes depend on values."""

    def build(self, seed, dtype):
        return nn.Linear(4, 4).to(dtype)

    def batches(self, steps, seed):
        yield from [torch.ones(2, 4)] * steps

    def loss(self, model, batch):
        out = model(batch)
        return out[: int((batch > 0).sum())].square().mean()

    def judge(self, model, part):
        return {"loss": 1.0}


def test_what_cannot_be_simulated_is_not_known():
    assert simulated_peak(Reading(), WAYS["adamw"](), simulate, dtype=torch.float32, seed=1) is None


def test_each_entry_is_simulated_once_and_stands_in_all_its_records(tmp_path):
    task = {"kind": "text", "steps": 2, "rows": 2, "length": 16, "hidden": 32, "layers": 1, "held": 4}
    entries = [{"name": "a", "baseline": "adamw"}, {"name": "b", "method": "svd(rank=4)", "dtype": "bfloat16"}]
    plan = make_plan({"name": "n", "task": task, "seeds": [1, 2], "entries": entries}, "a plan", tmp_path)
    execute(plan, tmp_path / "out", jobs=2)
    asked = []

    def counting(*given, **more):
        asked.append(given[1].label)
        return simulate(*given, **more)

    for _ in range(2):  # the second time nothing is missing
        add_peaks(plan, tmp_path / "out", counting)
    assert len(asked) == 2
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("runs/*/*/result.json"))]
    peaks = [(record["run_info"]["job"]["entry"], record["train_info"][PEAK]) for record in records]
    assert [name for name, _ in peaks] == ["a", "a", "b", "b"]
    assert peaks[0] == peaks[1] != peaks[2] == peaks[3]
