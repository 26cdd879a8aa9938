"""Runs of some of the processes of torch.distributed: each as one process on its batches, with nothing sent to the others.

Tolerance: 1e-12 in float64, as for the modes: sums over ranks are taken in another order.
"""

import pytest
import torch
from torch import distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lingrad
from benchmarks.traffic import Wire
from tests.support.cases import variants
from tests.support.models import gap, llama, text_batches, text_loss, zoo, zoo_batches, zoo_loss
from tests.support.processes import Attempts, each_rank, train
from tests.support.runs import MODES

TOLERANCE = 1e-12
STEPS = 6
# (config string, mode, options, whether of every kind of weight)
DEFAULT = [
    (rules, mode, options, False)
    for rules, options in (("svd(rank=4, every=3)", {}), ("power(rank=4, every=3)", {"stagger": True}))
    for mode in MODES
] + [("svd(rank=1, every=3)", mode, {}, True) for mode in MODES]
# what is in float32, or has signs that rounding decides, is not equal to 1e-12
REGISTERED = [text for text in variants() if "align=false" not in text and "precision=" not in text]
SLOW = [
    (text.format(side=("left", "right", "both")[i % 3]).replace("every=7", "every=3"), list(MODES)[i % 2], {}, False)
    for i, text in enumerate(REGISTERED)
]


def run(case, seed, rank=None, **options):
    rules, mode, given, every_kind = case
    build, batches, loss = (zoo, zoo_batches, zoo_loss) if every_kind else (llama, text_batches, text_loss)
    return train(build, rules, batches(STEPS, micro=2, seed=seed), loss, mode, {**given, **options}, rank)


def pairs(rank, world, cases):
    """Two runs of two processes each, on other batches."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    return [run(case, rank // 2, rank % 2, process_group=groups[rank // 2]) for case in cases]


def assert_two_runs_of_two(folder, cases):
    found = each_rank(pairs, 4, folder, cases)
    for i, case in enumerate(cases):
        for pair in (0, 1):
            one, other = found[2 * pair][i], found[2 * pair + 1][i]
            assert all(torch.equal(one[name], other[name]) for name in one), case
            assert gap(one, run(case, pair)) <= TOLERANCE, case
        assert gap(found[0][i], found[2][i]) > 1e-3, case  # another run


@pytest.mark.slow
def test_two_runs_of_two_processes(tmp_path):
    assert_two_runs_of_two(tmp_path, DEFAULT)


@pytest.mark.slow
def test_two_runs_of_two_processes_with_every_transform(tmp_path):
    assert_two_runs_of_two(tmp_path, SLOW)


def alone(rank, world):
    """A run of this process alone, that of each process with other batches and another number of steps; what it has sent."""
    groups = [distributed.new_group([other]) for other in range(world)]
    found, sent = [], 0
    for rules, mode, given, every_kind in DEFAULT:
        build, batches, loss = (zoo, zoo_batches, zoo_loss) if every_kind else (llama, text_batches, text_loss)
        with Wire() as wire:
            given = {**given, "process_group": groups[rank]}
            found.append(train(build, rules, batches(STEPS + rank, micro=2, seed=rank), loss, mode, given))
        sent += sum(wire.sent.values())
    return found, sent


@pytest.mark.slow
def test_a_run_of_one_process_sends_nothing(tmp_path):
    for rank, (found, sent) in enumerate(each_rank(alone, 2, tmp_path)):
        assert sent == 0
        for (rules, mode, given, every_kind), weights in zip(DEFAULT, found, strict=True):
            build, batches, loss = (zoo, zoo_batches, zoo_loss) if every_kind else (llama, text_batches, text_loss)
            expected = train(build, rules, batches(STEPS + rank, micro=2, seed=rank), loss, mode, given)
            assert all(torch.equal(weights[name], expected[name]) for name in expected), rules


def sharded(rank, world):
    """Two runs of two processes each, whose weights are sharded over the two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("runs", "shard"))["shard"]
    found = []
    for mode in MODES:
        model = llama()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = MODES[mode](model, "power(rank=4, every=3)", lr=1e-2, process_group=mesh.get_group())
        for batch, *_ in text_batches(4, seed=rank // 2):
            optimizer.zero_grad()
            text_loss(model, batch.chunk(2)[rank % 2]).backward()
            optimizer.step()
        found.append({name: w.full_tensor().clone() for name, w in optimizer.weights().items()})
    return found


@pytest.mark.slow
def test_two_sharded_runs_of_two_processes(tmp_path):
    found = each_rank(sharded, 4, tmp_path)
    for i, mode in enumerate(MODES):
        for pair in (0, 1):
            model = llama()
            optimizer = MODES[mode](model, "power(rank=4, every=3)", lr=1e-2)
            for batch, *_ in text_batches(4, seed=pair):
                optimizer.zero_grad()
                text_loss(model, batch).backward()
                optimizer.step()
            weights = found[2 * pair][i]
            assert all(torch.equal(weights[name], w) for name, w in found[2 * pair + 1][i].items())
            assert gap(weights, optimizer.weights()) <= TOLERANCE


SPEC = "svd(rank=2, every=3)"


def refused(rank, world):
    messages = attempt = Attempts()

    def small(width=6, names=("a", "b")):
        torch.manual_seed(0)
        return nn.ModuleDict({name: nn.Linear(6, width) for name in names})

    first, each = distributed.new_group([0]), [distributed.new_group([other]) for other in range(world)]
    if rank == 1:
        attempt(lambda: lingrad.wrap(small(), SPEC, lr=1e-2, process_group=first))
    else:
        attempt(lambda: lingrad.wrap(small(), SPEC, lr=1e-2, process_group=[0]))
    # ranks that differ say so instead of waiting for each other
    attempt(lambda: lingrad.wrap(small(names=("a", "bc"[rank])), SPEC, lr=1e-2))
    attempt(lambda: lingrad.wrap(small(width=6 + rank), SPEC, lr=1e-2))
    attempt(lambda: lingrad.wrap(small(names=("a", "b", "c")[: 2 + rank]), SPEC, lr=1e-2))
    attempt(lambda: lingrad.wrap(small(), SPEC, lr=1e-2, seed=rank))
    attempt(lambda: lingrad.wrap(small(), SPEC.replace("rank=2", f"rank={2 + rank}"), lr=1e-2))
    attempt(lambda: lingrad.wrap(small(), SPEC, lr=1e-2 * (1 + rank)))

    def in_ddp(ours, theirs):
        model = nn.Sequential(nn.Linear(6, 6))
        lingrad.wrap(model, SPEC, lr=1e-2, process_group=ours)
        DistributedDataParallel(model, process_group=theirs)(torch.ones(2, 6))

    attempt(lambda: in_ddp(each[rank], None))
    attempt(lambda: in_ddp(None, each[rank]))
    mesh = init_device_mesh("cpu", (world,))
    attempt(lambda: lingrad.wrap(fully_shard(nn.Sequential(nn.Linear(6, 6)), mesh=mesh), SPEC, process_group=each[rank]))
    return list(messages)


def test_what_does_not_belong_together_is_refused(tmp_path):
    (no_group, *found), (not_in, *other) = each_rank(refused, 2, tmp_path)
    assert no_group == (
        "process_group must be a group of torch.distributed (new_group(ranks), mesh.get_group()) or None, not a list"
    )
    assert not_in == (
        "process_group is a group that this process, rank 1, is not in; call lingrad with a group of the processes that train "
        "this model, this one among them, or not at all in this process"
    )
    *differ, many, few, shards = found
    assert differ == other[:-3]  # every process says the same
    ending = (
        ". Build the model and call lingrad alike in all of them; where processes hold different layers (pipeline stages), or "
        "train models of their own, give each set its group: process_group="
    )
    for message, one, two in zip(
        differ,
        (
            "b.weight [6, 6] in float32: svd(rank=2, every=3)",
            "a.weight [6, 6] in float32: svd(rank=2, every=3)",
            "name='vectors'",
            "seed=0",
            "a.weight [6, 6] in float32: svd(rank=2, every=3)",
            "lr=0.01",
        ),
        (
            "c.weight [6, 6] in float32: svd(rank=2, every=3)",
            "a.weight [7, 6] in float32: svd(rank=2, every=3)",
            "c.weight [6, 6] in float32: svd(rank=2, every=3)",
            "seed=1",
            "a.weight [6, 6] in float32: svd(rank=3, every=3)",
            "lr=0.02",
        ),
        strict=True,
    ):
        assert message == f"the 2 processes of this run do not train the same: rank 0 has {one}; rank 1 has {two}{ending}"
    both = (
        "gradients would be averaged over the ones, and bases chosen by the others. Pass one group to both: "
        "lingrad.wrap(model, ..., process_group=group), DistributedDataParallel(model, process_group=group)"
    )
    assert many == f"this model is in a DistributedDataParallel of the ranks [0, 1], and its run is of [0]: {both}"
    assert few == f"this model is in a DistributedDataParallel of the ranks [0], and its run is of [0, 1]: {both}"
    assert shards == (
        "0.weight is spread over the ranks [0, 1], and the processes of this run are [0]; they must train one model together. "
        "Shard over a mesh of all of them, or pass the mesh's group: process_group=mesh.get_group()"
    )


def test_torch_distributed_that_begins_later(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6))
    optimizer = lingrad.wrap(model, SPEC, lr=1e-2)
    optimizer.zero_grad()
    model(torch.ones(2, 6)).sum().backward()
    optimizer._run.count = 0  # as one of two processes sees it
    with pytest.raises(lingrad.errors.ModeError, match="torch.distributed was initialized after lingrad was called"):
        optimizer.step()
