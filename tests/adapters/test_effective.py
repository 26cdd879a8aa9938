"""W + S z as a tensor in the hands of others: its data, its flags, arrays of it, parameters that are made of it."""

import pytest
import torch
from torch import nn

from lingrad.errors import ModeError
from tests.adapters.test_reading import IDS, NAMES, close, held, trained
from tests.support.runs import each_mode


def plus_one(weight):
    weight.data += 1  # as PEFT merges


def add_itself(weight):
    weight.data = weight.data + 1


def twice(weight):
    weight.data = weight.data
    weight.data += 1


@pytest.mark.parametrize("write", [plus_one, add_itself, twice])
@each_mode
def test_data_that_is_assigned_back_is_the_weight(mode, write):
    """In adapter mode a tensor without memory became the parameter's own, and the process died."""
    model, optimizer = trained(mode)
    before = {name: weight.detach().clone() for name, weight in optimizer.weights().items()}
    for name in NAMES:
        write(held(model, name))
        close(held(model, name).detach(), before[name] + 1)
    model(IDS)
    for name in NAMES:
        close(optimizer.weights()[name], before[name] + 1)


@each_mode
def test_data_may_become_the_memory_of_another_parameter(mode):
    model, optimizer = trained(mode)
    weight = optimizer.weights()["linear.weight"].clone()
    other = nn.Linear(8, 6).double()
    other.weight.data = model.linear.weight.data
    close(other.weight.detach(), weight)
    close(other(torch.eye(8).double()) - other.bias, weight.T)


COPIES = {
    "parameter": nn.Parameter,
    "of data": lambda weight: nn.Parameter(weight.data),
    "of a row": lambda weight: nn.Parameter(weight.data[:1]),
    "leaf": lambda weight: weight.detach().requires_grad_(),
    "in a module": lambda weight: nn.Linear(8, 6).register_parameter("weight", weight),
}


@pytest.mark.parametrize("made", COPIES)
def test_what_would_be_a_parameter_of_its_own_is_refused(made):
    model, _ = trained("adapter")
    with pytest.raises(ModeError, match=r"linear\.weight is .*detach\(\)\.clone\(\)"):
        COPIES[made](model.linear.weight)


def test_arrays_of_numbers_that_were_formed_are_read_only():
    model, _ = trained("adapter")
    with pytest.raises(ValueError, match="read-only"):
        model.linear.weight.detach().numpy()[0] = 0


@each_mode
def test_a_weight_is_frozen_by_its_own_flag(mode):
    model, optimizer = trained(mode)
    model.linear.weight.requires_grad = False
    assert not model.linear.weight.requires_grad
    before = optimizer.weights()["linear.weight"].clone()
    optimizer.zero_grad()
    model(IDS).square().mean().backward()
    optimizer.step()
    assert torch.equal(optimizer.weights()["linear.weight"], before)
    model.linear.weight.requires_grad_(True)
    optimizer.zero_grad()
    model(IDS).square().mean().backward()
    optimizer.step()
    assert not torch.equal(optimizer.weights()["linear.weight"], before)
