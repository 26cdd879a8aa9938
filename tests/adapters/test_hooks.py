"""Hooks on gradients that are never formed, put there after wrapping."""

import pytest
import torch

import lingrad
from lingrad.errors import ModeError
from tests.adapters.test_reading import NAMES, held, trained
from tests.engine.test_follow import HOOKS, RULES, mixed
from tests.support.small import repeat


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_came_after_wrapping_on_a_gradient_that_is_never_formed_stops_the_next_step(hook):
    model = mixed()
    optimizer = lingrad.wrap(model, RULES, lr=1e-2)
    repeat(model, optimizer)
    handle = HOOKS[hook](model.inner.weight)
    before = model.inner.weight.detach().clone()
    with pytest.raises(ModeError, match=r"^inner\.weight has a hook on its gradient, which would never be called"):
        repeat(model, optimizer)
    assert torch.equal(model.inner.weight, before)
    handle.remove()
    repeat(model, optimizer)
    assert not torch.equal(model.inner.weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_whoever_asks_for_the_memory_of_a_sum_or_hooks_its_gradient_is_told(name):
    model, _ = trained("adapter")
    weight = held(model, name)
    assert not weight.detach().numpy().flags.writeable
    with pytest.raises(ModeError, match=rf"the memory of {name} is asked for.*detach\(\).clone\(\)"):
        torch.from_dlpack(weight.detach())
    for register in (weight.register_hook, weight.register_post_accumulate_grad_hook):
        with pytest.raises(ModeError, match=rf"a hook is put on the gradient of {name}.*by a rule: 'none'"):
            register(lambda _: None)
    other = torch.ones_like(weight)
    with torch.no_grad():
        held(model, name).set_(other)
    assert torch.equal(held(model, name).detach() + 0, other)
