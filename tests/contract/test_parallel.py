"""Data parallelism: two processes, each with half of every batch, train as one process with the whole of it."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lingrad
from lingrad.errors import ModeError
from tests.support.cases import SIDED, UNSIDED
from tests.support.models import gap, llama, text_batches, text_loss, zoo, zoo_batches, zoo_loss
from tests.support.processes import each_rank, train
from tests.support.runs import MODES

STEPS, EVERY = 7, 3
ZOO = {"*": f"svd(rank=1, every={EVERY})"}
SIDES = ("left", "right", "both")
SHARED = ("svd(rank=4, every=3, side=right)", "power(rank=4, every=3, side=right)")
# every transform on one side by default, and on another in the slow tests
DEFAULT = [text.format(side=SIDES[i % 3]) for i, text in enumerate(SIDED)] + list(UNSIDED)
SLOW = [text.format(side=SIDES[(i + 1) % 3]) for i, text in enumerate(SIDED)]


def runs(specs):
    """(build, rules, batches, loss, mode): every transform in the mode its number says, every kind of weight in both.

    Bases that several layers share, and turns: in both modes too.
    """
    for number, text in enumerate(specs):
        rules = text.replace("every=7", f"every={EVERY}")
        yield llama, rules, text_batches(STEPS, micro=2), text_loss, ("optimizer", "adapter")[number % 2]
    if specs is DEFAULT:
        for mode in MODES:
            yield zoo, ZOO, zoo_batches(STEPS), zoo_loss, mode
            for rules in SHARED:
                yield llama, rules, text_batches(STEPS, micro=2), text_loss, mode, {"share": "input", "stagger": True}


def work(rank, world, specs):
    # singular vectors differ in their last bits between thread counts
    torch.set_num_threads(1 + rank if specs == "slow" else 1)
    found = []
    for run in runs(DEFAULT if specs == "default" else SLOW):
        torch.manual_seed(1000 + rank)  # nothing may depend on the global generator
        found.append(train(*run, rank=rank))
    return found


def assert_two_processes_are_one(folder, which, specs):
    first, second = each_rank(work, 2, folder, which)
    for run, one, other in zip(runs(specs), first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one), run[1]
        assert gap(one, train(*run)) <= 1e-12, run[1]


def test_two_processes_are_one(tmp_path):
    assert_two_processes_are_one(tmp_path, "default", DEFAULT)


@pytest.mark.slow
def test_two_processes_are_one_on_other_sides(tmp_path):
    assert_two_processes_are_one(tmp_path, "slow", SLOW)


def count_bytes(rank, world):
    """All that is all-reduced in each step, by DistributedDataParallel and by us, in bytes."""
    counted = []
    reduce = distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        counted[-1] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counting
    found = {}
    llamas = (llama, "power(rank=4, every=3)", text_batches(7), text_loss)
    zoos = (zoo, ZOO, zoo_batches(7), zoo_loss)
    for build, rules, batches, loss in (llamas, zoos):
        model = build()
        optimizer = lingrad.wrap(model, rules, lr=1e-2)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, allreduce_hook)  # so that its buckets go through all_reduce above
        counted.clear()
        for batch, *_ in batches:
            counted.append(0)
            optimizer.zero_grad()
            loss(ddp, batch.chunk(2)[rank]).backward()
            optimizer.step()
        trained = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
        found[build.__name__] = [trained, *counted]
    return found


@pytest.mark.slow
def test_what_is_sent_is_as_small_as_what_is_trained(tmp_path):
    for trained, *steps in each_rank(count_bytes, 2, tmp_path)[0].values():
        for step, sent in enumerate(steps):
            if step % 3:
                assert sent == trained  # r-sized: coordinates, and what is trained in full
            else:
                assert sent > trained  # products, or matrices, for the refresh


def two_ranks(rank, world):
    model = zoo()
    with pytest.raises(ModeError, match="pass the model itself to lingrad first, then build DistributedDataParallel"):
        lingrad.wrap(DistributedDataParallel(model), "svd(rank=1)", lr=1e-2)
    # a rank whose part of the batch does not reach a layer
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "rare": nn.Linear(4, 4)}).double()
    forward = lambda x: model["used"](x) + (model["rare"](x) if rank == 0 else 0)  # noqa: E731
    optimizer = lingrad.wrap(model, "svd(rank=2, every=2)", lr=1e-2)
    model.forward = forward
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for seed in range(4):
        optimizer.zero_grad()
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ddp(x).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert [sub.basis.refreshes for sub in optimizer.subspaces] == [2, 2]
    found = {name: w.clone() for name, w in optimizer.weights().items()}
    optimizer.detach()
    assert not getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    return found


@pytest.mark.slow
def test_ranks_that_see_different_layers_agree(tmp_path):
    first, second = each_rank(two_ranks, 2, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
