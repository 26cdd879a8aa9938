"""fully_shard (FSDP2): processes that each hold some rows of every weight train as one process with the whole of it.

Tolerance: 1e-12 in float64, as for the modes: sums over ranks are taken in another order.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lingrad
from lingrad.errors import ModeError
from tests.support.cases import SIDED, UNSIDED
from tests.support.models import gap, llama, text_batches, text_loss
from tests.support.processes import each_rank
from tests.support.runs import MODES

STEPS, EVERY = 9, 3
TOLERANCE = 1e-12
SIDES = ("left", "right", "both", "short", "long")
SPECS = [text.format(side=side) for text in SIDED for side in SIDES] + list(UNSIDED)
CARRIES = ("keep", "reset", "rotate")
# what else a run may do, in turn
OPTIONS = (
    {},
    {"carry": "reset"},
    {"carry": "rotate"},
    {"stagger": True},
    {"scale": 0.25, "weight_decay": 0.0},
    {"ledger": True},
)


def matrix(kept):
    """(spec, mode, options, whether clipped): every transform on every side, and in both modes those that ``kept`` chooses."""
    for number, (spec, mode) in enumerate(itertools.product(SPECS, MODES)):
        if kept(number):
            yield spec, mode, OPTIONS[number % len(OPTIONS)], number % 4 == 0


SHARED = [
    (spec, mode, {"share": "input", "stagger": True}, False)
    for spec in ("power(rank=4, every=7, side=right)", "svd(rank=4, every=7, side=right)")
    for mode in MODES
]
DEFAULT = [*matrix(lambda number: number % 11 == 0), *SHARED[:2]]
SLOW = [*matrix(lambda number: number % 11), *SHARED[2:]]


def shard(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_of(optimizer):
    return {name: full(weight.detach()).clone() for name, weight in optimizer.weights().items()}


def train(spec, mode, options, clipped, rank=0, world=1, *, model=None, steps=STEPS, switches=True, base="adamw"):
    """Micro-batches, a schedule, a decay, a clip and a switch; the weights and the norms."""
    if model is None:
        model = llama()
        if world > 1:
            shard(model)
    # eps: S^T G of both-sided singular vectors is diagonal but for rounding, which Adam divides by rounding plus eps
    given = {"lr": 1e-2, "weight_decay": 0.1, **({"eps": 1e-4} if base == "adamw" else {}), **options}
    optimizer = MODES[mode](model, spec.replace("every=7", f"every={EVERY}"), base, **given)
    norms = []
    for step, micro_batches in enumerate(text_batches(steps, micro=2, rows=6)):
        if switches and step == steps - 4:
            optimizer.switch("adapter" if optimizer.mode == "optimizer" else "optimizer")
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / (2 * steps))
        optimizer.zero_grad()
        for batch in micro_batches:
            (text_loss(model, batch.chunk(world)[rank]) / 2).backward()
        if clipped:
            norms.append(full(optimizer.clip_grad_norm_(0.5)))
        optimizer.step()
    return weights_of(optimizer), norms


def work(rank, world, cases):
    return [train(*case, rank=rank, world=world) for case in cases]


def assert_one(folder, world, cases):
    first, *others = each_rank(work, world, folder, cases)
    for i, case in enumerate(cases):
        weights, norms = first[i]
        for other in others:
            assert all(torch.equal(weight, other[i][0][name]) for name, weight in weights.items()), case
        expected, expected_norms = train(*case)
        assert gap(weights, expected) <= TOLERANCE, case
        assert [float(norm) for norm in norms] == pytest.approx([float(norm) for norm in expected_norms], rel=TOLERANCE)


def test_two_processes_are_one(tmp_path):
    assert_one(tmp_path, 2, DEFAULT)


def test_three_processes_with_uneven_rows_are_one(tmp_path):
    assert_one(tmp_path, 3, DEFAULT[::3])


@pytest.mark.slow
def test_two_processes_are_one_in_every_combination(tmp_path):
    assert_one(tmp_path, 2, SLOW)


@pytest.mark.slow
def test_three_processes_are_one_in_many(tmp_path):
    assert_one(tmp_path, 3, SLOW[::4])
