"""Budgets of a step, counted: kernels that a GPU would launch, values that its host would wait for, addresses that move.

The launches are those of real steps on meta tensors with CUDA's operators (`benchmarks.launches`). No time is measured.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lingrad
from benchmarks.launches import count
from benchmarks.plan import ADAPTER, ENTRIES, FROZEN, FULL, OPTIMIZER
from lingrad.models import LlamaShape, build_llama, next_token_loss

RANK, PERIOD, TOKENS = 16, 200, 512
each_mode = pytest.mark.parametrize("mode", ["optimizer", "adapter"])


def counted(key, dtype, layers):
    return count(ENTRIES[key].make(RANK, PERIOD), LlamaShape(256, 128, 344, layers, 4, 256), dtype, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches(dtype):
    """Per transformed layer, beyond full AdamW, which launches one product for its gradient.

    Optimizer mode launches X Q where its basis is on the right (6 of 7 layers), dY^T (X Q) in place of that product, and a
    merge; with a left basis dY P in place of X Q. That is 2, and a few for all layers together: zeros for the coordinates,
    their rounding, a second and third param group of the base.
    """
    layers = 8
    linears = 7 * layers
    full, optimizer = (counted(key, dtype, layers).total for key in (FULL, OPTIMIZER))
    assert (optimizer.launches - full.launches) / linears <= 2.2
    assert full.reads == optimizer.reads == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_adapter_mode(dtype):
    """With the rest frozen as PEFT does, beyond linear layers that are frozen too; by way of the coordinates.

    X Q, z's share of the output in one product into it, the same two for the gradient of the input, dY^T (X Q): 5, or a
    product less where P or Q is missing; in bfloat16 z is rounded in the forward and in the backward.
    """
    layers = 4
    linears = 7 * layers
    frozen, adapter = (counted(key, dtype, layers).total for key in (FROZEN, ADAPTER))
    more = (adapter.launches - frozen.launches) / linears
    assert more <= (4.3 if dtype == torch.float32 else 6.3)
    assert adapter.reads == 0


def test_a_step_of_28_layers_in_bfloat16():
    """A merge for each, one zero and one rounding for all, and the base."""
    assert counted(OPTIMIZER, torch.bfloat16, 4).step.launches <= 45


@each_mode
@pytest.mark.parametrize("spec", ["random(rank=4, every=50)", "power(rank=4, every=50)", "svd(rank=4, every=50)"])
def test_addresses_stay_where_they_are(mode, spec):
    """What a CUDA graph reads and writes between its steps: weights, bases, moments, and in adapter mode coordinates."""
    model = build_llama(LlamaShape(64, 32, 88, 1, 2, 16), seed=0)
    start = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[mode]
    optimizer = start(model, spec, "adamw", lr=1e-3, weight_decay=0.1)
    found = []
    for ids in torch.randint(0, 64, (6, 2, 8)):
        optimizer.zero_grad()
        next_token_loss(model, ids).backward()
        optimizer.step()
        held = [*model.parameters(), *(tensor for tensor, _ in optimizer.held())]
        found.append([tensor.data_ptr() for tensor in held])
    assert found[1:] == [found[1]] * 5


def test_merges_now_and_then_wait_for_nothing_once_there_was_one():
    class Reads(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            return func(*args, **(kwargs or {}))

    model = build_llama(LlamaShape(64, 32, 88, 1, 2, 16), seed=0)
    optimizer = lingrad.adapt(model, "random(rank=4, every=50)", "adamw", lr=1e-3, merge_every=2)
    reads = []
    for ids in torch.randint(0, 64, (6, 2, 8)):
        optimizer.zero_grad()
        next_token_loss(model, ids).backward()
        with Reads() as mode:
            optimizer.step()
        reads.append(mode.found)
    assert reads[1] > 0  # the first merge
    assert reads[2:] == [0] * 4
