"""A run as a whole: what it keeps alive, and what reading its state does to it."""

import gc
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tests.support.models import llama, text_batches, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode


@each_mode
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_run_that_is_dropped_is_freed(mode, layerwise):
    def run():
        model = zoo()
        optimizer = MODES[mode](model, {"head": "none", "*": "svd(rank=2, every=2)"}, "adamw", lr=1e-3, layerwise=layerwise)
        for (batch,) in zoo_batches(3, micro=1):
            zoo_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = [model, *model.parameters(), *(sub.coords for sub in optimizer.subspaces), *optimizer.subspaces]
        kept += [tensor for sub in optimizer.subspaces for tensor in sub.basis.tensors()]
        return [weakref.ref(item) for item in kept]

    dropped = run()
    gc.collect()
    assert [item() for item in dropped if item() is not None] == []


@each_mode
def test_reading_the_state_of_a_fresh_optimizer_does_not_count_as_a_step(mode):
    """get_optimizer_state_dict steps once, on zero gradients and at lr=0, to make the state appear."""
    weights = []
    for read in (False, True):
        model = llama()
        optimizer = MODES[mode](model, "random(rank=4, every=2)", "sgd", lr=1e-2, momentum=0.9)
        if read:
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, text_batches(4, micro=1), schedule=False)
        weights.append(optimizer.weights())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
