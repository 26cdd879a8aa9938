"""A sharded run under torchrun, of which a process dies in mid-step, goes on from its last save as the run without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.models import gap

ROOT = Path(__file__).parents[2]
KILLED = 4  # a refresh was in step 3


def run(folder, killed, count):
    """The weights at the end, or None where a process was killed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += ["--max-restarts=0", "--monitor-interval=0.2", "-m", "tests.support.elastic_script", str(folder), str(killed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if killed >= 0:
        assert ended.returncode
        assert "exitcode  : -9" in ended.stderr or "Connection reset by peer" in ended.stderr
        assert sorted(path.name for path in folder.iterdir()) == [f"{step + 1}" for step in range(killed)]
        return None
    assert ended.returncode == 0, ended.stderr[-3000:]
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "count"),
    [
        ("optimizer", 2),
        ("adapter", 3),
        pytest.param("optimizer", 3, marks=pytest.mark.exhaustive),
        pytest.param("adapter", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_a_process_that_dies_in_mid_step(tmp_path, mode, count):
    """Started again, by the same number of processes or by another, the run goes on from the last save."""
    expected = run(tmp_path / f"{mode}-whole", -1, 2)
    folder = tmp_path / f"{mode}-{count}"
    run(folder, KILLED, 2)
    found = run(folder, -1, count)
    assert gap(found, expected) <= (0 if count == 2 else 1e-12)
