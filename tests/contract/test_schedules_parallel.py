"""Bases that a rule refreshes, in several processes: all decide alike, as one process with the whole batch does."""

import pytest
import torch

from tests.contract import test_tensor_parallel as tensor_parallel
from tests.support import processes, sharded
from tests.support.models import gap, llama, text_batches, text_loss, zoo, zoo_batches, zoo_loss
from tests.support.processes import each_rank

STEPS, EVERY = 10, 2
# Of several processes an energy is estimated from test vectors, and of one it is exact: so they are compared where it is clear.
RULES = {
    "energy(fraction=0.001)": ("svd", "power"),
    "energy(fraction=1.0, least=1.0)": ("svd", "power"),
    "overlap(threshold=0.3, after=1)": ("svd", "power"),
    "path(threshold=0.7)": ("svd", "power"),
    "path(threshold=0.7, measure=displacement)": ("power",),
}
CASES = [
    (f"{transform}(rank=3, every={EVERY}, side={side}, schedule={rule})", mode, options)
    for i, (rule, transforms) in enumerate(RULES.items())
    for j, transform in enumerate(transforms)
    for side, mode, options in [
        (("left", "right", "both")[(i + j) % 3], ("optimizer", "adapter")[(i + j) % 2], {}),
        ("right", ("adapter", "optimizer")[(i + j) % 2], {"share": "input", "stagger": True}),
    ]
]
CLOSE_CALLS = [f"{t}(rank=3, every={EVERY}, schedule=energy(fraction=0.93))" for t in ("svd", "power")]


def replicated(rank, world):
    found = []
    for spec, mode, options in CASES:
        found.append(processes.train(llama, spec, text_batches(STEPS, micro=2), text_loss, mode, options, rank=rank))
    for spec in CLOSE_CALLS:
        found.append(processes.train(llama, spec, text_batches(STEPS), text_loss, "optimizer", rank=rank))
    rules = {"*": f"svd(rank=1, every={EVERY}, schedule=path(threshold=0.8))"}  # weights of hooks, which average by themselves
    found.append(processes.train(zoo, rules, zoo_batches(STEPS), zoo_loss, "optimizer", rank=rank))
    return found


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    first, second = each_rank(replicated, 2, tmp_path)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for (spec, mode, options), found in zip(CASES, first, strict=False):
        assert gap(found, processes.train(llama, spec, text_batches(STEPS, micro=2), text_loss, mode, options)) <= 1e-12, spec
    rules = {"*": f"svd(rank=1, every={EVERY}, schedule=path(threshold=0.8))"}
    assert gap(first[-1], processes.train(zoo, rules, zoo_batches(STEPS), zoo_loss, "optimizer")) <= 1e-12


def cut(rank, world, cases):
    return [sharded.train(spec, mode, options, True, rank, world, steps=STEPS)[0] for spec, mode, options in cases]


SHARDED = [case for case in CASES if "stagger" not in case[2]][::2]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_shards_are_one(tmp_path, world):
    first, *others = each_rank(cut, world, tmp_path, SHARDED)
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert all(torch.equal(one[name], same[name]) for name in one)
    for case, found in zip(SHARDED, first, strict=True):
        (expected,) = cut(0, 1, [case])
        assert gap(found, expected) <= 1e-12, case


@pytest.mark.slow
def test_layers_that_are_cut_are_one(tmp_path):
    specs = [f"{transforms[0]}(rank=4, every={EVERY}, side={{side}}, schedule={rule})" for rule, transforms in RULES.items()]
    cases = [
        (tensor_parallel.rules(spec), ("optimizer", "adapter")[i % 2], ({}, {"share": "input"})[i // 2 % 2], i % 2 == 0)
        for i, spec in enumerate(specs)
    ]
    tensor_parallel.assert_one(tmp_path, 2, cases)
