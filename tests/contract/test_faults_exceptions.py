"""Calls that fail half-way: nothing is lost, and the next step is the step it would have been."""

import contextlib

import pytest
import torch

from lingrad.testing.training import every_kind
from tests.support.models import gap, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode
from tests.support.small import EVERYTHING, EXACT, close, named, teach


def leaves_nothing_behind(model):
    return all(not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks for m in model.modules()) and all(
        not p._post_accumulate_grad_hooks and not p._backward_hooks and not vars(p) for p in model.parameters()
    )


class Fault(Exception):
    pass


@contextlib.contextmanager
def fault_in_forward(model, optimizer):
    def raising(*_):
        raise Fault

    handle = model.middle.register_forward_pre_hook(raising)
    yield
    handle.remove()


@contextlib.contextmanager
def fault_in_backward(model, optimizer):
    """Layers behind the experts have their gradients by then, those before them do not."""

    def raising(grad):
        raise Fault

    handle = model.experts.register_forward_hook(lambda module, args, out: out.register_hook(raising) and None)
    yield
    handle.remove()


@contextlib.contextmanager
def fault_in_base(model, optimizer):
    def raising(*_, **__):
        raise Fault

    handle = optimizer.base.register_step_pre_hook(raising)
    yield
    handle.remove()


class TestExceptions:
    @each_mode
    @pytest.mark.parametrize("fault", [fault_in_forward, fault_in_backward, fault_in_base])
    @pytest.mark.parametrize(("carry", "decay"), [("keep", 0.0), ("keep", 0.1), ("reset", 0.0), ("rotate", 0.0)])
    def test_a_step_that_failed_and_is_repeated_is_one_step(self, mode, fault, carry, decay):
        """The base fails before it has changed anything, as it does where its state finds no memory."""
        weights = []
        for faulty in (False, True):
            model = every_kind()
            optimizer = MODES[mode](model, EVERYTHING, lr=0.01, weight_decay=decay, carry=carry)

            def attempt(batch, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                for ids in batch:
                    zoo_loss(model, ids).backward()
                optimizer.step()

            for step, batch in enumerate(zoo_batches(6)):
                if faulty and step in (0, 3, 4):  # the first refresh, no refresh, a later one
                    with fault(model, optimizer), pytest.raises(Fault):
                        attempt(batch)
                attempt(batch)
            assert all(sub.basis.refreshes == 3 for sub in optimizer.subspaces)
            optimizer.detach()
            weights.append(named(model))
        assert leaves_nothing_behind(model)
        assert gap(*weights) <= EXACT

    def test_a_hook_of_the_user_s_that_fails_on_a_gradient(self):
        """Registered before ours it runs before ours, and what it leaves in weight.grad must not count in the next attempt.

        Adapter mode, in which it would never be called, refuses it: `tests/engine/test_follow.py`.
        """
        batch = zoo_batches(1, micro=1)[0][0]
        grads = []
        for faulty in (False, True):
            model = every_kind()
            armed = [faulty]

            def hook(_, armed=armed):
                if armed[0]:
                    raise Fault

            model.conv.weight.register_post_accumulate_grad_hook(hook)
            optimizer = MODES["optimizer"](model, {"conv": "svd(rank=2)"}, "sgd", lr=0.1)
            if faulty:
                with pytest.raises(Fault):
                    zoo_loss(model, batch).backward()
                armed[0] = False
                optimizer.zero_grad()
            zoo_loss(model, batch).backward()
            grads.append(optimizer.subspaces[0].pending.total.dense())
        close(*grads)

    @each_mode
    def test_detaching_after_a_failure_gives_the_model_back(self, mode):
        for fault in (fault_in_forward, fault_in_backward, fault_in_base):
            plain, model = every_kind(), every_kind()
            optimizer = MODES[mode](model, EVERYTHING, lr=0.01)
            with fault(model, optimizer), pytest.raises(Fault):
                teach(model, optimizer, zoo_batches(1))
            optimizer.detach()
            assert leaves_nothing_behind(model)
            assert list(model.state_dict()) == list(plain.state_dict())
            assert all(torch.equal(named(model)[name], p) for name, p in plain.named_parameters())
