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


def resumable(mode, spec, world, seed, *, sharded):
    model = llama()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(seed * 1e-3)
    if sharded:
        shard(model)
    return model, MODES[mode](model, spec, "adamw", lr=1e-2, weight_decay=0.1, eps=1e-4)


def go_on(model, optimizer, batches, rank, world):
    for batch, _ in batches:
        optimizer.zero_grad()
        text_loss(model, batch.chunk(world)[rank]).backward()
        optimizer.step()
    return weights_of(optimizer)


BATCHES = text_batches(9, micro=2, rows=6)
BEFORE = 5  # steps before it is saved: two after a refresh


def state(model, optimizer, flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}, options


def save(rank, world, cases, folder):
    from torch.distributed import checkpoint

    found = []
    for i, (spec, mode, flat) in enumerate(cases):
        model, optimizer = resumable(mode, spec, world, 0, sharded=True)
        go_on(model, optimizer, BATCHES[:BEFORE], rank, world)
        checkpoint.save(state(model, optimizer, flat)[0], checkpoint_id=f"{folder}/{i}")
        found.append(go_on(model, optimizer, BATCHES[BEFORE:], rank, world))
    return found


def load(rank, world, cases, folder, sharded):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = []
    for i, (spec, mode, flat) in enumerate(cases):
        model, optimizer = resumable(mode, spec, world, 7, sharded=sharded)
        states, options = state(model, optimizer, flat)
        checkpoint.load(states, checkpoint_id=f"{folder}/{i}")
        set_state_dict(
            model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
        )
        found.append(go_on(model, optimizer, BATCHES[BEFORE:], rank, world))
    return found


SAVED = [
    ("svd(rank=4, every=3)", "optimizer", False),
    ("power(rank=4, every=3, side=left)", "adapter", True),
    ("random(rank=4, every=5)", "adapter", False),
    ("pca(rank=4)", "optimizer", True),
]


@pytest.mark.parametrize(
    ("world", "sharded"),
    [(2, True), pytest.param(1, True, marks=pytest.mark.slow), (1, False), pytest.param(3, True, marks=pytest.mark.slow)],
)
def test_a_checkpoint_of_two_processes_goes_on_with_any_number(tmp_path, world, sharded):
    expected = each_rank(save, 2, tmp_path, SAVED, str(tmp_path))[0]
    found = each_rank(load, world, tmp_path, SAVED, str(tmp_path), sharded)[0]
    for case, one, other in zip(SAVED, expected, found, strict=True):
        assert gap(other, one) <= (0 if world == 2 else TOLERANCE), case
