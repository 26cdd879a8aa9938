"""The learning rate range test where several processes share a run: one result for all, and the run is as before."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lingrad
from tests.support.processes import each_rank
from tests.support.runs import MODES


def work(rank, world, cases):
    return [trained(rank, *case) for case in cases]


def trained(rank, mode, sharded):
    """The losses of a test, and the weights after two more steps, with and without it."""
    found = []
    for looks in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        if sharded:
            fully_shard(model)
        opt = MODES[mode](model, {"0": "svd(rank=2, every=2)", "2": "random(rank=2, every=3)"}, lr=1e-2)
        outer = model if sharded else DistributedDataParallel(model)
        taken = [0]

        def step(opt=opt, outer=outer, taken=taken):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * taken[0] + rank), dtype=torch.float64)
            taken[0] += 1
            opt.zero_grad()
            loss = outer(x).square().mean()
            loss.backward()
            opt.step()
            return loss

        for _ in range(3):
            step()
        if looks:
            # only the loss of the second process is NaN in the end: the test of both ends there
            def last(taken=taken, step=step):
                return step() * (float("nan") if rank and taken[0] == 6 else 1.0)

            test = lingrad.find_lr(opt, last, low=1e-3, high=0.1, steps=4)
            found.append({"losses": torch.tensor(test.losses), "ended": test.ended})
        taken[0] = 3
        for _ in range(2):
            step()
        weights = opt.weights()
        found.append({name: weight.full_tensor() if sharded else weight.detach() for name, weight in weights.items()})
    return found


@pytest.mark.slow
def test_two_processes_end_at_one_step_and_go_on_as_before(tmp_path):
    cases = [(mode, sharded) for mode in MODES for sharded in (False, True)]
    for first, second in zip(*each_rank(work, 2, tmp_path, cases), strict=True):
        for test, after, without in (first, second):
            assert test["ended"] == "not finite"
            assert len(test["losses"]) == 2
            assert after.keys() == without.keys()
            assert all(torch.equal(after[name], without[name]) for name in after)
        assert torch.equal(first[0]["losses"], second[0]["losses"])  # the mean over processes
