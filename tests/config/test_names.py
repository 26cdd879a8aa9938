"""Names, and so seeds and checkpoints, are the plain model's, whatever torch has wrapped around its layers."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lingrad
from lingrad.config.names import held_parameters, parameter_at
from lingrad.errors import ModeError


def build():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))).double()


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "checkpointed blocks": lambda model: nn.Sequential(*map(checkpoint_wrapper, model)),
    "compiled blocks": lambda model: nn.Sequential(*map(compiled, model)),
    "compiled": compiled,
    "both": lambda model: compiled(nn.Sequential(*(compiled(checkpoint_wrapper(block)) for block in model))),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@each_wrapper
def test_they_are_those_of_the_plain_model(wrap):
    model = build()
    plain = dict(model.named_parameters())
    wrapped = wrap(model)
    assert {held.name: held.param for held in held_parameters(wrapped)} == plain
    for name, param in plain.items():
        assert parameter_at(wrapped, name) is param
    assert parameter_at(wrapped, "0.7.weight") is None
    assert parameter_at(wrapped, "0.0.scale") is None


@each_wrapper
@pytest.mark.parametrize("start", [lingrad.wrap, lingrad.adapt])
def test_a_wrapped_model_trains_and_resumes_as_the_plain_one(wrap, start):
    runs = []
    for wrapper in (lambda model: model, wrap):
        model = build()
        called = wrapper(model)
        optimizer = start(called, "random(rank=2, every=2)", lr=1e-2)
        for seed in range(5):
            optimizer.zero_grad()
            x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            called(x).square().mean().backward()
            optimizer.step()
        runs.append(optimizer)
    plain, wrapped = runs
    for name, weight in plain.weights().items():
        torch.testing.assert_close(wrapped.weights()[name], weight, rtol=1e-12, atol=1e-14)  # summed in other orders
    plain.load_state_dict(wrapped.state_dict())


@each_wrapper
def test_a_layer_that_is_replaced_is_found(wrap):
    model = build()
    called = wrap(model)
    optimizer = lingrad.wrap(called, "random(rank=2, every=2)", lr=1e-2)
    model[1][0] = nn.Linear(6, 8).double()
    called(torch.randn(4, 6, dtype=torch.float64)).square().mean().backward()
    with pytest.raises(ModeError, match="1.0.weight is another parameter now"):
        optimizer.step()
