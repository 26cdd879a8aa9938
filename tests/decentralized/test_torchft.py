"""Workers on torchft over loopback: the numbers of the simulation, and what a fault costs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lingrad.decentralized import simulate
from tests.support.workers import EVERY, STEPS, program
from tests.support.workers_script import await_file

coordination = pytest.importorskip("torchft.coordination")
ROOT = Path(__file__).parents[2]
SPEC = "slice(rank=4, every=8, workers=3)"


@pytest.fixture
def run(tmp_path):
    """Starts a lighthouse and workers, and gives what each has found; None for one that died."""
    servers, started = [], []

    def start(told, *, join=10_000, seconds=100, late=()):
        servers.append(
            coordination.LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=join, quorum_tick_ms=50)
        )
        address = servers[0].address()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

        def begin(one, i):
            full = {"name": str(i), "folder": str(tmp_path), "lighthouse": address, "all": list(range(len(told))), **one}
            command = [sys.executable, "-m", "tests.support.workers_script", json.dumps(full)]
            log = (tmp_path / f"{i}.log").open("w")
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
            return started[-1]

        until = time.monotonic() + seconds
        processes = [begin(one, i) for i, one in enumerate(told)]
        for one in late:
            await_file(tmp_path / "waits-0")  # after the others have had an exchange without it
            processes.append(begin({**one, "all": []}, len(processes)))
        codes = [process.wait(max(0, until - time.monotonic())) for process in processes]
        paths = [tmp_path / f"{i}.pt" for i in range(len(processes))]
        for code, i in zip(codes, range(len(processes)), strict=True):
            assert code in (0, 9), (tmp_path / f"{i}.log").read_text()[-3000:]
        return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]

    yield start
    for process in started:
        process.kill()
    for server in servers:
        server.shutdown()


def same(one, other):
    return all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


def told(number, **more):
    return {"number": number, "program": {"spec": SPEC}, **more}


@pytest.mark.slow
def test_numbers_of_the_simulation(run):
    found = run([told(k) for k in range(3)])
    expected = simulate(lambda workers: program(workers, SPEC) | {"sent": workers.sent}, 3)
    for own, simulated in zip(found, expected, strict=True):
        assert same(own, simulated)
        assert own["sent"] == simulated["sent"]


@pytest.mark.slow
def test_one_that_dies_costs_its_round(run):
    """The others are those of a simulation that it leaves before the exchange of that round."""
    found = run([told(0), told(1, dies_in=EVERY + 1), told(2)])
    expected = simulate(lambda w: program(w, SPEC, steps=EVERY + 1 if w.number == 1 else STEPS), 3)
    assert found[1] is None
    assert same(found[0], expected[0])
    assert same(found[2], expected[2])


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SPEC, "slice(rank=4, every=8, choice=by_gradient, workers=3)"])
def test_one_that_joins(run, spec):
    """A new worker takes over the weights of the others, and then trains with them, under a number that is free."""
    longer = {"spec": spec, "steps": 8 * EVERY}
    there = {"program": longer, "waits_in": 2 * EVERY + 1, "waits_for": "ready-3", "pause": 0.4}
    found = run([told(0, **there), told(1, program=longer, dies_in=1), told(2, **there)], late=[told(1, program=longer)])
    assert found[1] is None
    assert same(found[0], found[2])
    assert same(found[0], found[3])
    assert len(found[3]["joined"]) == 1
    assert found[3]["joined"][0] in range(3 * EVERY, 8 * EVERY, EVERY)


@pytest.mark.slow
def test_a_slow_one_is_left_behind(run):
    """The others wait as long as the lighthouse does; it then takes over their weights, and its round is lost."""
    longer = {"spec": SPEC, "steps": 12 * EVERY}
    late = told(1, program=longer, sleeps_in=EVERY + 1, seconds=12)
    found = run([told(0, program=longer, pause=0.5), late, told(2, program=longer, pause=0.5)], join=4000)
    assert same(found[0], found[2])
    assert found[1]["joined"], "it was not late"
    assert same(found[1], found[0])


@pytest.mark.slow
def test_two_of_one_number(run, tmp_path):
    with pytest.raises(AssertionError, match="two workers say that they are number 1, and would train one slice twice"):
        run([told(0), told(1), told(1)])
