"""Runs of two processes of torchrun, compared with one process."""

import contextlib
import json
import weakref

import pytest
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lingrad.research import processes, trial
from lingrad.research.record import RESULT
from lingrad.research.training import METRICS

TASK = {"kind": "text", "steps": 4, "hidden": 32, "layers": 1, "length": 16, "rows": 4, "held": 4}


def run_made(folder, count, entry, **run):
    folder.mkdir()
    content = {
        "name": "two",
        "task": TASK,
        "run": {"dtype": "float64", "processes": count, "diagnostics": [], **run},
        "entries": [{"name": "a", "options": {"lr": 1e-2}, **entry}],
    }
    job = {"content": content, "where": "plan.toml", "folder": str(folder), "quick": False, "entry": "a", "values": {}}
    job |= {"seed": 1, "part": "final", "steps": None, "threads": 2}
    (folder / "job.json").write_text(json.dumps(job))
    assert trial.main(str(folder / "job.json"), str(folder / "out")) == 0
    lines = [json.loads(line) for line in (folder / "out" / METRICS).read_text().splitlines()]
    return json.loads((folder / "out" / RESULT).read_text()), lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [{"method": "svd(rank=4, every=2)"}, {"method": "random(rank=4)", "mode": "adapter"}, {"baseline": "lora(rank=4)"}],
    ids=["optimizer", "adapter", "lora"],
)
def test_two_processes_are_one(tmp_path, entry):
    one, lines = run_made(tmp_path / "one", 1, entry)
    two, others = run_made(tmp_path / "two", 2, entry)
    assert two["train_info"]["status"] == "success", two["run_info"]["error_msg"]
    # float64: sums over the rows of a batch are made in another order, and Adam divides by small second moments
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in lines], abs=1e-10)
    assert two["train_info"]["metrics"]["loss"] == pytest.approx(one["train_info"]["metrics"]["loss"], abs=1e-10)
    assert two["train_info"]["total_tokens"] == one["train_info"]["total_tokens"]


@pytest.mark.slow
def test_rows_that_cannot_be_shared_are_a_failure_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setitem(TASK, "rows", 3)
    folder = tmp_path / "three"
    with pytest.raises(AssertionError):  # torchrun says that a process failed
        run_made(folder, 2, {"method": "svd(rank=4)"})
    record = json.loads((folder / "out" / RESULT).read_text())
    assert "cannot be cut for 2 processes" in record["run_info"]["error_msg"]


def build(held):
    """A DistributedDataParallel in a cycle."""
    model = DistributedDataParallel(nn.Linear(2, 2))
    model.itself = [model]
    held.append(weakref.ref(model))
    return model


def end(held):
    build(held)


def fail(held):
    model = build(held)
    raise ValueError(f"{type(model).__name__} has failed")


def fail_and_exit(held):
    """As a process other than the first one."""
    try:
        fail(held)
    except ValueError as error:
        raise SystemExit(1) from error


@pytest.mark.parametrize(("run", "error"), [(end, None), (fail, ValueError), (fail_and_exit, SystemExit)])
def test_what_holds_the_group_is_freed_before_it(monkeypatch, run, error):
    """A DistributedDataParallel that is freed later may wait for gloo's threads for ever."""
    given = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    held, destroy, alive = [], distributed.destroy_process_group, []
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: (alive.append(held[0]() is not None), destroy()))
    with pytest.raises(error) if error else contextlib.nullcontext(), processes.joined("cpu"):
        run(held)
    assert alive == [False]
