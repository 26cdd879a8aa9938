"""Trackers: what is logged, where files go, and what is said of trackers that are not there."""

import json

import pytest

from lingrad.errors import DependencyError, SpecError
from lingrad.research import trial
from lingrad.research.record import RESULT
from lingrad.research.trackers import FOLDER, check_trackers, tracked
from tests.research.test_execution import job, written

tracking = pytest.importorskip("accelerate.tracking", reason="make test installs it (extra: hf)")

LISTED = """
import json
from pathlib import Path
from accelerate.tracking import GeneralTracker

class Listed(GeneralTracker):
    name = "listed"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.lines, self.path = [run_name], Path(logging_dir) / "listed.json"

    def start(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.lines.append(values)

    def log(self, values, step=None, **_):
        self.lines.append([step, values])

    def finish(self):
        self.path.write_text(json.dumps(self.lines))
"""


def test_a_run_is_logged_and_logged_again_from_its_record(tmp_path):
    path = written(tmp_path / "plan", more='[run]\ntrackers = ["listed.py:Listed"]\n')
    (path.parent / "listed.py").write_text(LISTED)
    record = trial.run_job(job(path), tmp_path / "out")
    assert record["train_info"]["status"] == "success", record["run_info"]["error_msg"]
    name, config, *lines = json.loads((tmp_path / "out" / FOLDER / "listed.json").read_text())
    assert name == "svd, seed 3, final"
    assert config == {"run": name, "entry": "svd", "part": "final", "seed": 3, "lr": 0.01}
    assert [step for step, _ in lines] == [1, 2, 3, 4, 4]
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [values["loss"] for _, values in lines[:4]] == [line["loss"] for line in steps]
    assert lines[-1][1] == record["train_info"]["metrics"]
    assert trial.main(str(tmp_path / "out" / RESULT), str(tmp_path / "again")) == 0
    again = json.loads((tmp_path / "again" / FOLDER / "listed.json").read_text())
    assert [values["loss"] for _, values in again[2:]] == [values["loss"] for _, values in lines]


def test_without_trackers_nothing_is_written(tmp_path):
    trial.run_job(job(written(tmp_path / "plan")), tmp_path / "out")
    assert not (tmp_path / "out" / FOLDER).exists()


def test_what_is_not_finite_is_not_logged(tmp_path):
    (tmp_path / "listed.py").write_text(LISTED)
    with tracked(["listed.py:Listed"], tmp_path, project="p", run="r", config={}, out=tmp_path) as log:
        log({"a": float("nan"), "b": 1.0}, 1)
    assert json.loads((tmp_path / FOLDER / "listed.json").read_text())[2:] == [[1, {"b": 1.0}]]


def test_what_is_said_of_trackers_that_are_not_there(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(SpecError, match="there is no tracker 'tensorbord'; did you mean 'tensorboard'?"):
        check_trackers(["tensorbord"])
    with pytest.raises(DependencyError) as caught:
        check_trackers(["tensorboard"])
    assert str(caught.value) == "the tracker tensorboard needs its package, which is not installed: pip install tensorboard"
    check_trackers([])
