"""What happens to gradients between backward and step: clipped, zeroed, or unusual."""

import warnings

import pytest
import torch
from torch import nn

import lingrad
from lingrad.engine.refresh import choose
from lingrad.errors import ModeError
from lingrad.transforms import Sides
from tests.support.layers import backward, inputs, layer
from tests.support.runs import MODES, each_mode


class TestClipping:
    @each_mode
    def test_the_norm_is_that_of_the_gradient_the_step_uses(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2, every=2)", "sgd", lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, seed=step)
            (sub,) = optimizer.subspaces
            norm = optimizer.clip_grad_norm_(1.0)
            grads = [sub.coords.grad, model[0].bias.grad]
            assert norm > 1
            assert torch.stack([g.norm() for g in grads]).norm() == pytest.approx(1.0, rel=1e-5)
            before = sub.coords.grad.clone()
            optimizer.clip_grad_norm_(float("inf"))  # the basis is chosen once
            assert sub.basis.refreshes == (1 + step) // 2  # and committed by the step
            optimizer.step()
            assert sub.basis.refreshes == 1 + step // 2
            assert torch.equal(sub.coords.grad, before)

    @each_mode
    def test_a_step_skipped_after_a_clip_refreshes_nothing(self, mode):
        """As GradScaler does where a gradient overflowed."""
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2, every=2)", "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        before, weight = sub.map().tensors[0].clone(), model[0].weight.detach().clone()
        backward(model)
        optimizer.clip_grad_norm_(1.0)
        optimizer.zero_grad()
        assert sub.basis.refreshes == 0
        assert torch.equal(sub.map().tensors[0], before)
        assert torch.equal(model[0].weight, weight)
        assert not sub.coords.any()
        backward(model, seed=1)
        optimizer.step()
        assert sub.basis.refreshes == 1

    @each_mode
    def test_a_backward_after_the_clip_is_refused_where_a_basis_was_chosen(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
        backward(model)
        optimizer.clip_grad_norm_(1.0)
        with pytest.raises(ModeError, match="clip after the last backward of a step"):
            backward(model, seed=1)

    @each_mode
    @pytest.mark.parametrize("every", [1, 3])
    def test_clipping_from_outside_keeps_its_factor_over_a_refresh(self, mode, every):
        """clip_grad_norm_(model.parameters()), as the Trainer does it, between backward and step."""
        model = layer()
        optimizer = MODES[mode](model, f"svd(rank=2, every={every})", "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        for step in range(4):
            optimizer.zero_grad()
            backward(model, seed=step)
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            pending = sub.pending.total.dense().clone() if sub.basis.due else None
            clipped = sub.coords.grad.clone()
            optimizer.step()
            if pending is not None:
                clipped = sub.map().project(pending) * (0.5 / (norm + 1e-6))
            torch.testing.assert_close(sub.coords.grad, clipped, rtol=1e-12, atol=1e-12)

    def test_an_unscaled_gradient_keeps_its_factor_where_a_weight_got_zeros(self):
        model = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)]).double()
        optimizer = lingrad.wrap(model, "svd(rank=1, side=left)", "sgd", lr=1.0)
        scale = 1024.0
        (model[0](inputs()).square().sum() * scale).backward()
        # a gradient in one row, which the basis before the refresh does not see
        first, unseen = torch.eye(6, dtype=torch.float64)[:2]
        optimizer.subspaces[1].basis.replace(Sides(first[:, None], None), 0)
        ((model[1](inputs()) * unseen).sum() * scale).backward()
        assert not optimizer.subspaces[1].coords.grad.any()
        for sub in optimizer.subspaces:
            sub.coords.grad /= scale
        pending = optimizer.subspaces[1].pending.total.dense().clone()
        optimizer.step()
        sub = optimizer.subspaces[1]
        torch.testing.assert_close(sub.coords.grad, sub.map().project(pending) / scale)

    @each_mode
    def test_a_clip_by_a_norm_that_is_not_finite_refreshes_nothing(self, mode):
        """Another weight's gradient overflowed; here the gradient was good, and the clip made it NaN."""
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        before = sub.map().tensors[0].clone()
        backward(model)
        model[0].bias.grad[0] = float("nan")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.warns(
            RuntimeWarning, match="0.weight: the gradient's norm at a refresh is not finite; the old basis stays"
        ):
            choose(optimizer._run, optimizer.subspaces)
        assert sub.basis.due
        assert sub.basis.proposal is None
        assert torch.equal(sub.map().tensors[0], before)

    @each_mode
    def test_a_change_by_more_than_a_factor_is_refused_on_a_refresh_step(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2, every=2)", "sgd", lr=0.1)
        backward(model)
        optimizer.subspaces[0].coords.grad.clamp_(max=0.1)
        weight = optimizer.weights()["0.weight"].clone()
        with pytest.raises(ModeError) as caught:
            optimizer.step()
        assert str(caught.value) == (
            "the gradient of 0.weight was changed between backward and step in another way than by one factor. "
            "This step reads the gradient itself, for a refresh or a residual, and the change cannot be carried over. "
            "Change the gradient by one factor, or use opt.clip_grad_norm_, which refreshes first."
        )
        assert torch.equal(weight, optimizer.weights()["0.weight"])
        optimizer.zero_grad()
        backward(model)
        optimizer.step()  # the next step works
        optimizer.zero_grad()
        backward(model)
        optimizer.subspaces[0].coords.grad.clamp_(max=0.1)
        optimizer.step()  # off a refresh any change is the user's

    def test_a_gradient_set_by_hand_is_refused_on_a_refresh_step(self):
        optimizer = lingrad.wrap(layer(), "svd(rank=2)", "sgd", lr=0.1)
        optimizer.subspaces[0].coords.grad = torch.ones_like(optimizer.subspaces[0].coords)
        with pytest.raises(ModeError, match="did not come from a backward since the last step"):
            optimizer.step()


class TestZeroGrad:
    @pytest.mark.parametrize("how", ["optimizer", "model", "zeros", "by hand"])
    @each_mode
    def test_forgetting_a_gradient_forgets_that_of_the_refresh(self, mode, how):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        backward(model, seed=1)
        if how == "optimizer":
            optimizer.zero_grad()
        elif how == "model":
            model.zero_grad()
        elif how == "zeros":
            model.zero_grad(set_to_none=False)
        else:
            sub.coords.grad.zero_()
        backward(model, seed=2)
        expected = 2 * model[0](inputs(2)).detach().t() @ inputs(2)
        torch.testing.assert_close(sub.pending.total.dense(), expected, rtol=1e-12, atol=1e-12)

    @each_mode
    def test_micro_batches_add_up_in_the_refresh(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
        for seed in (1, 2, 3):
            backward(model, seed)
        expected = sum(2 * model[0](inputs(s)).detach().t() @ inputs(s) for s in (1, 2, 3))
        torch.testing.assert_close(optimizer.subspaces[0].pending.total.dense(), expected, rtol=1e-12, atol=1e-12)
        optimizer.step()
        assert optimizer.subspaces[0].pending.total is None


class TestUnusualGradients:
    @each_mode
    def test_a_weight_without_a_gradient_stands_still_and_stays_due(self, mode):
        model = nn.ModuleList([layer(), layer()])
        optimizer = MODES[mode](model, "svd(rank=2, every=3)", "adamw", lr=0.1, weight_decay=0.5)
        used, unused = optimizer.subspaces
        before = optimizer.weights()["1.0.weight"].clone()
        for _ in range(2):
            optimizer.zero_grad()
            backward(model[0])
            optimizer.step()
        assert (used.basis.refreshes, unused.basis.refreshes) == (1, 0)
        assert torch.equal(optimizer.weights()["1.0.weight"], before)
        assert unused.basis.due
        assert not used.basis.due
        backward(model[1])
        optimizer.step()
        assert unused.basis.refreshes == 1

    @each_mode
    def test_a_zero_gradient_keeps_the_basis_and_does_not_decide_it(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2, every=5)", "adamw", lr=0.1)
        (sub,) = optimizer.subspaces
        start = sub.map().tensors[0].clone()
        (model(inputs()) * 0).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert torch.equal(sub.map().tensors[0], start)
        assert sub.basis.due  # no gradient has been seen yet
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert sub.basis.refreshes == 1

    @each_mode
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_gradient_that_is_not_finite_keeps_the_basis_and_says_so_once(self, mode, value):
        model = layer(bias=False)
        optimizer = MODES[mode](model, "svd(rank=2, every=1)", "sgd", lr=0.0)
        (sub,) = optimizer.subspaces
        backward(model)
        optimizer.step()
        basis = sub.map().tensors[0].clone()
        messages = []
        for _ in range(2):
            optimizer.zero_grad()
            (model(inputs()).sum() * value).backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                choose(optimizer._run, optimizer.subspaces)
            messages += [str(w.message) for w in caught]
            optimizer.zero_grad()
        assert messages == ["0.weight: the gradient's norm at a refresh is not finite; the old basis stays until the next one"]
        assert torch.equal(sub.map().tensors[0], basis)
        backward(model)
        optimizer.step()
        assert sub.basis.refreshes == 2

    def test_a_basis_that_is_not_finite_is_refused(self, monkeypatch):
        from lingrad.transforms import SVD, Sides

        optimizer = lingrad.wrap(model := layer(), "svd(rank=2)", "sgd", lr=0.1)
        monkeypatch.setattr(SVD, "bases", lambda self, grad, old, when: Sides(*(b if b is None else b / 0 for b in old)))
        backward(model)
        with pytest.warns(RuntimeWarning, match="0.weight: svd gave a basis that is not finite; the old one stays"):
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
