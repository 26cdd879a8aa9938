"""Processes that start at once: what a caller sees of trials that end, fail, are killed, and of a host that is."""

import json
import os
import signal

import pytest

from lingrad.research.host import Host


@pytest.fixture(scope="module")
def host():
    found = Host()
    yield found
    found.close()


def endless(folder):
    (folder / "waits.py").write_text("import time\ntime.sleep(1000)\n")
    job = {"content": {"name": "waits", "imports": ["waits.py"]}, "where": "plan", "folder": str(folder), "quick": False}
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "threads": 1}))
    return path


def test_trials_one_after_another(host, tmp_path):
    for number in range(2):
        job, errors = tmp_path / f"{number}.json", tmp_path / f"{number}.err"
        job.write_text(json.dumps({"no": "job"}))
        host.start(job, tmp_path / "out", errors)
        assert host.wait() == host.returncode == 2
        assert "is neither a job nor the record of a run: KeyError: 'content'" in errors.read_text()


def test_a_missing_file_and_one_that_is_killed(host, tmp_path):
    host.start(tmp_path / "none.json", tmp_path / "out", tmp_path / "errors")
    assert host.wait() == 2
    host.start(endless(tmp_path), tmp_path / "out", tmp_path / "errors")
    host.kill()
    assert host.wait() == -signal.SIGKILL
    host.start(tmp_path / "none.json", tmp_path / "out", tmp_path / "errors")
    assert host.wait() == 2


@pytest.mark.slow
def test_a_host_that_was_killed_takes_its_trial_with_it(tmp_path):
    host = Host()
    host.start(endless(tmp_path), tmp_path / "out", tmp_path / "errors")
    while not host._trial:
        host.poll()
    os.kill(host._process.pid, signal.SIGKILL)
    assert host.wait() < 0
    assert not host.free
    host.start(tmp_path / "none.json", tmp_path / "out", tmp_path / "errors")  # as good as a trial that was killed at once
    assert host.wait() < 0
    host.close()
