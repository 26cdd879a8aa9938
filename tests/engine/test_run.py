"""A run as a whole: what it keeps alive, and what reading its state does to it."""

import gc
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import lingrad
from lingrad.errors import SpecError
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


@each_mode
@pytest.mark.parametrize("rules", ["svd(rank=2, every=2)", "lm_head: none; *: svd(rank=2, every=2)"])
def test_a_detached_model_is_freed_without_the_garbage_collector(mode, rules):
    model = llama()
    optimizer = MODES[mode](model, rules, lr=1e-3)
    train(model, optimizer, text_batches(2, micro=1), schedule=False)
    optimizer.detach()
    gc.collect()
    gc.disable()
    try:
        kept = [weakref.ref(item) for item in (*optimizer.attachments, *(sub.basis for sub in optimizer.subspaces))]
        del optimizer
        assert [item() for item in kept if item() is not None] == []
    finally:
        gc.enable()


def test_param_groups_that_are_replaced_are_those_of_the_next_step():
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=2, every=2)", "adamw", lr=1e-2, weight_decay=0.1)
    train(model, optimizer, text_batches(2, micro=1), schedule=False)  # the base optimizer is built by now
    before = {name: weight.clone() for name, weight in optimizer.weights().items()}
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    train(model, optimizer, text_batches(2, micro=1), schedule=False)
    assert all(torch.equal(before[name], weight) for name, weight in optimizer.weights().items())


def test_parameters_are_excluded_from_decay_after_the_base_was_built():
    weights = []
    for decay in (0.0, 0.1):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=2, every=2)", "adamw", lr=1e-2, weight_decay=decay)
        assert optimizer.base.param_groups
        optimizer.exclude_from_decay(lambda name: False)
        train(model, optimizer, text_batches(2, micro=1), schedule=False)
        weights.append(optimizer.weights())
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


@pytest.mark.parametrize("decaying", [["norm"], "norm", None])
def test_what_decides_about_decay_is_a_function(decaying):
    optimizer = lingrad.wrap(llama(), "svd(rank=2, every=2)", "adamw", lr=1e-2)
    with pytest.raises(
        SpecError, match=r"decaying must be a function of a parameter's name, not .*; such as opt\.exclude_from_decay"
    ):
        optimizer.exclude_from_decay(decaying)
