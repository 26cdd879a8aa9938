"""One worker of a run on torchft, as a program; a JSON on the command line tells what happens to it."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from lingrad import decentralized
from tests.support.workers import program


def await_file(path):
    """Wait for it, for a minute."""
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)


def main():
    """Train until the end, or until what is told of this worker happens."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(told["folder"])
    joined = []
    with decentralized.TorchftWorkers(
        told["number"], lighthouse=told["lighthouse"], at_least=1, timeout=20, patience=60, on_join=joined.append
    ) as workers:
        (folder / f"ready-{told['name']}").touch()
        for name in told["all"]:
            await_file(folder / f"ready-{name}")

        def before(step):
            if step == told.get("dies_in"):
                os._exit(9)
            if step == told.get("sleeps_in"):
                time.sleep(told["seconds"])
            if step == told.get("waits_in"):
                (folder / f"waits-{told['name']}").touch()
                await_file(folder / told["waits_for"])
            time.sleep(told.get("pause", 0))

        found = program(workers, **told["program"], before=before, first=joined)
    torch.save({**found, "joined": joined, "sent": workers.sent}, folder / f"{told['name']}.pt")
    os._exit(0)


if __name__ == "__main__":
    main()
