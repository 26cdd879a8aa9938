"""Two processes under `accelerate launch` and torchrun, on CPUs: one run, each with its half of every batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lingrad.hf
from tests.support.models import gap
from tests.support.trainers import assert_equal

ROOT = Path(__file__).parents[2]
# --multi_gpu means several processes on one machine; with --cpu, accelerate starts one, and leaves the others to MPI
LAUNCHERS = {
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ],
    "torchrun": ["torch.distributed.run"],
}


def run(folder, mode, *options, launcher=None):
    command = [sys.executable, "-m"]
    if launcher is not None:
        count = "--num_processes=2" if launcher == "accelerate" else "--nproc_per_node=2"
        port = 20000 + os.getpid() % 20000
        command += [
            *LAUNCHERS[launcher],
            count,
            f"--{'main_process_port' if launcher == 'accelerate' else 'master_port'}={port}",
            "-m",
        ]
    command += ["tests.support.trainer_script", str(folder), mode, "svd(rank=4, every=2)", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "launcher"), [("optimizer", "torchrun"), ("adapter", "accelerate")])
def test_two_processes_are_one_run(tmp_path, mode, launcher):
    run(tmp_path / "two", mode, launcher=launcher)
    first, second = (torch.load(tmp_path / f"two/end-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (first["world"], first["rank"], second["rank"]) == (2, 0, 1)
    assert_equal(first["weights"], second["weights"])
    assert_equal(first["state"], second["state"])

    run(tmp_path / "one", mode, "--rows", "4")
    alone = torch.load(tmp_path / "one/end-0.pt", weights_only=True)
    assert gap(first["weights"], alone["weights"]) < 1e-4  # float32, sums in another order; 3e-6 measured

    run(tmp_path / "again", mode, "--steps", "5", launcher=launcher)
    assert lingrad.hf.last_checkpoint(tmp_path / "again") == str(tmp_path / "again/checkpoint-3")
    run(tmp_path / "again", mode, launcher=launcher)
    for rank, straight in enumerate((first, second)):
        again = torch.load(tmp_path / f"again/end-{rank}.pt", weights_only=True)
        assert_equal(again["weights"], straight["weights"])
        assert_equal(again["state"], straight["state"])
