"""Workers that are processes of torch.distributed: the numbers of the simulation, and errors instead of waiting."""

import os
import time

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lingrad.decentralized import ProcessWorkers, simulate
from lingrad.errors import ExchangeError, ModeError
from tests.support.models import text_loss
from tests.support.processes import each_rank
from tests.support.workers import batch, program, start

RUNS = {
    "orthogonal": ("slice(rank=4, every=8, workers=3)", {}),
    "identical": ("slice(rank=4, every=8, choice=identical)", {"combine": "mean", "momentum": 0.9, "lr": 0.7}),
    "independent": ("slice(rank=4, every=4, choice=independent, side=both)", {"moments": "reset", "frozen": False}),
    "by_gradient": ("slice(rank=4, every=8, choice=by_gradient, workers=3)", {"send": "8bit"}),
    "whole weights": ("full()", {"combine": "mean"}),
}


def train(spec, options):
    def work(workers):
        return program(workers, spec, **options)["weights"] | {"sent": torch.tensor(workers.sent)}

    return work


def in_a_process(rank, world, spec, options):
    return train(spec, options)(ProcessWorkers())


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.slow
def test_numbers_of_the_simulation(name, tmp_path):
    """The weights of every worker to the bit, and the bytes."""
    spec, options = RUNS[name]
    found = each_rank(in_a_process, 3, tmp_path, spec, options)
    for own, simulated in zip(found, simulate(train(spec, options), 3), strict=True):
        assert all(torch.equal(own[key], value) for key, value in simulated.items())


def two_teams(rank, world):
    """Two runs of two workers each in one world of four."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    return train("slice(rank=4, every=4, workers=2)", {"seed": rank // 2})(ProcessWorkers(groups[rank // 2]))


@pytest.mark.slow
def test_groups(tmp_path):
    found = each_rank(two_teams, 4, tmp_path)
    for team in range(2):
        expected = simulate(train("slice(rank=4, every=4, workers=2)", {"seed": team}), 2)
        for number in range(2):
            own = found[2 * team + number]
            assert all(torch.equal(own[key], value) for key, value in expected[number].items())


def in_ddp(rank, world):
    model, _ = start(ProcessWorkers(), "slice(rank=4, workers=2)", every=200)
    with pytest.raises(ModeError) as found:
        text_loss(DistributedDataParallel(model), batch(0, rank))
    return str(found.value)


@pytest.mark.slow
def test_gradients_are_not_averaged_by_others(tmp_path):
    message = (
        "this model is in a DistributedDataParallel of the ranks [0, 1], and trains in rounds, in which workers do not average "
        "gradients; leave DistributedDataParallel out"
    )
    assert each_rank(in_ddp, 2, tmp_path) == [message, message]


def loses_one(rank, world, folder):
    """The last process dies before the exchange; the others say so within the timeout."""
    distributed.barrier()  # all have found each other
    if rank == 2:
        time.sleep(1.0)  # in which the others leave the barrier
        os._exit(0)
    try:
        program(ProcessWorkers(), "slice(rank=4, every=4, workers=3)", steps=4)
    except ExchangeError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_one_that_dies_ends_a_fixed_set(tmp_path):
    with pytest.raises(FileNotFoundError):  # what the dead one would have left
        each_rank(loses_one, 3, tmp_path, str(tmp_path))
    for rank in range(2):
        text = torch.load(tmp_path / f"found-{rank}.pt", weights_only=True)
        assert text.startswith("an exchange of 3 workers failed; one of them has died or is late: ")
        assert text.endswith("start again from a checkpoint, or use lingrad.decentralized.TorchftWorkers")


def test_without_processes():
    with pytest.raises(ModeError, match="which is not initialized: start them with torchrun"):
        ProcessWorkers()
