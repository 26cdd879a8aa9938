"""The step: its order, what it reads, what it leaves behind, and what it refuses."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import ModeError, SpecError
from lingrad.transforms import Bases
from tests.training import gap, llama, text_batches, text_loss, train, zoo

MODES = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}
each_mode = pytest.mark.parametrize("mode", MODES)


def layer(m=6, n=8, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, m, bias=bias)).double()


def inputs(seed=1, rows=5, n=8):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(model, seed=1):
    model(inputs(seed)).square().sum().backward()


@each_mode
def test_a_step_by_hand(mode):
    """W <- (1 - lr wd) W - lr scale P P^T G for SGD; the bias takes the plain learning rate."""
    model = layer()
    weight, bias = (p.detach().clone() for p in model.parameters())
    optimizer = MODES[mode](model, "svd(rank=2, side=left)", "sgd", lr=0.1, weight_decay=0.5, scale=0.25)
    x = inputs()
    out_grad = 2 * (x @ weight.t() + bias)
    backward(model)
    optimizer.step()
    basis = torch.linalg.svd(out_grad.t() @ x).U[:, :2]
    expected = 0.95 * weight - 0.1 * 0.25 * basis @ basis.t() @ out_grad.t() @ x
    torch.testing.assert_close(optimizer.weights()["0.weight"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].bias.detach(), 0.95 * bias - 0.1 * out_grad.sum(0), rtol=1e-12, atol=1e-12)
    (sub,) = optimizer.subspaces
    assert bool(sub.coords.any()) == (mode == "adapter")


@pytest.mark.parametrize("spec", ["svd(rank=4, clip=true, every=2)", "full()"])
def test_full_rank_sgd_is_plain_sgd(spec):
    """At rank min(m, n) an orthonormal basis spans the shorter side, so P P^T G = G."""
    spec = spec.replace("rank=4", "rank=1000")
    plain, model = llama(), llama()
    batches = text_batches(10)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), batches)
    for mode in MODES:
        model = llama()
        train(model, optimizer := MODES[mode](model, spec, "sgd", lr=0.1), batches)
        optimizer.detach()
        assert gap(dict(model.named_parameters()), dict(plain.named_parameters())) <= 1e-12


@each_mode
def test_full_is_stock_adamw(mode):
    plain, model = llama(), llama()
    batches = text_batches(10)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1), batches)
    optimizer = MODES[mode](model, "full()", "adamw", lr=1e-2, weight_decay=0.1)
    train(model, optimizer, batches)
    optimizer.detach()
    assert gap(dict(model.named_parameters()), dict(plain.named_parameters())) <= 1e-12


class TestGroups:
    def test_names_and_contents(self):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-3, scale=0.5, weight_decay=0.1, betas=(0.8, 0.9))
        groups = {group["name"]: group for group in optimizer.param_groups}
        assert list(groups) == ["coords", "matrices", "vectors"]
        assert all(g["lr"] == 1e-3 and g["betas"] == (0.8, 0.9) and g["weight_decay"] == 0.1 for g in groups.values())
        assert groups["coords"]["scale"] == 0.5
        assert groups["matrices"]["param_names"] == ["model.embed_tokens.weight", "lm_head.weight"]
        assert all(p.dim() == 1 for p in groups["vectors"]["params"])
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}

    def test_schedulers_that_set_the_learning_rate_keep_the_scale(self):
        model = layer(bias=False)
        weight = model[0].weight.detach().clone()
        optimizer = lingrad.wrap(model, "full()", "sgd", lr=1.0, scale=0.25, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        lr, momentum = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        assert lr == pytest.approx(0.004)
        backward(model)
        optimizer.step()
        out_grad = 2 * inputs() @ weight.t()
        expected = weight - lr * 0.25 * out_grad.t() @ inputs()
        torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-12, atol=1e-12)
        scheduler.step()
        optimizer.step()
        assert optimizer.base.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"] != momentum

    def test_decay_uses_the_plain_learning_rate(self):
        model = layer(bias=False)
        weight = model[0].weight.detach().clone()
        optimizer = lingrad.wrap(model, "svd(rank=2)", "sgd", lr=0.1, weight_decay=0.5, scale=0.0)
        backward(model)
        optimizer.step()
        torch.testing.assert_close(model[0].weight.detach(), 0.95 * weight, rtol=1e-15, atol=0)

    def test_groups_are_settled_when_the_optimizer_exists(self):
        optimizer = lingrad.wrap(layer(), "svd(rank=2)", lr=0.1)
        with pytest.raises(ModeError, match="pass them all to lingrad.wrap"):
            optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.zeros(2)))]})


@each_mode
def test_closure(mode):
    model = layer()
    optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
    before = optimizer.weights()["0.weight"].clone()

    def closure():
        optimizer.zero_grad()
        loss = model(inputs()).square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(before, optimizer.weights()["0.weight"])


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
            assert sub.refreshes == (1 + step) // 2  # and committed by the step
            optimizer.step()
            assert sub.refreshes == 1 + step // 2
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
        assert sub.refreshes == 0
        assert torch.equal(sub.map().tensors[0], before)
        assert torch.equal(model[0].weight, weight)
        assert not sub.coords.any()
        backward(model, seed=1)
        optimizer.step()
        assert sub.refreshes == 1

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
            pending = sub.captured.total.dense().clone() if sub.due else None
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
        optimizer.subspaces[1].replace_state(Bases(first[:, None], None), 0)
        ((model[1](inputs()) * unseen).sum() * scale).backward()
        assert not optimizer.subspaces[1].coords.grad.any()
        for sub in optimizer.subspaces:
            sub.coords.grad /= scale
        pending = optimizer.subspaces[1].captured.total.dense().clone()
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
        with pytest.warns(RuntimeWarning, match="0.weight: the gradient at a refresh is not finite; the old basis stays"):
            optimizer._choose(optimizer.subspaces)
        assert sub.due
        assert sub.proposal is None
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
            "This step refreshes its basis, so the change cannot be carried over. "
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
        torch.testing.assert_close(sub.captured.total.dense(), expected, rtol=1e-12, atol=1e-12)

    @each_mode
    def test_micro_batches_add_up_in_the_refresh(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
        for seed in (1, 2, 3):
            backward(model, seed)
        expected = sum(2 * model[0](inputs(s)).detach().t() @ inputs(s) for s in (1, 2, 3))
        torch.testing.assert_close(optimizer.subspaces[0].captured.total.dense(), expected, rtol=1e-12, atol=1e-12)
        optimizer.step()
        assert optimizer.subspaces[0].captured.total is None


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
        assert (used.refreshes, unused.refreshes) == (1, 0)
        assert torch.equal(optimizer.weights()["1.0.weight"], before)
        assert unused.due
        assert not used.due
        backward(model[1])
        optimizer.step()
        assert unused.refreshes == 1

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
        assert sub.due  # no gradient has been seen yet
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert sub.refreshes == 1

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
                optimizer._choose(optimizer.subspaces)
            messages += [str(w.message) for w in caught]
            optimizer.zero_grad()
        assert messages == ["0.weight: the gradient at a refresh is not finite; the old basis stays until the next one"]
        assert torch.equal(sub.map().tensors[0], basis)
        backward(model)
        optimizer.step()
        assert sub.refreshes == 2

    def test_a_basis_that_is_not_finite_is_refused(self, monkeypatch):
        from lingrad.transforms import SVD, Bases

        optimizer = lingrad.wrap(model := layer(), "svd(rank=2)", "sgd", lr=0.1)
        monkeypatch.setattr(SVD, "bases", lambda self, grad, old, when: Bases(*(b if b is None else b / 0 for b in old)))
        backward(model)
        with pytest.warns(RuntimeWarning, match="0.weight: svd gave a basis that is not finite; the old one stays"):
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


class Counting(torch.optim.SGD):
    """Keeps a number in its param group, as Prodigy does, and a tensor from its very start, as some do."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["k"] = 0
            for p in group["params"]:
                self.state[p]["sum"] = torch.ones_like(p)

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["sum"] += 1
        return super().step(closure)


class TestBaseState:
    def test_what_a_base_keeps_in_its_param_group_is_kept_and_saved(self):
        model = layer()
        optimizer = lingrad.wrap(model, "svd(rank=2)", Counting, lr=0.1)
        for _ in range(3):
            backward(model)
            optimizer.step()
        assert [group["k"] for group in optimizer.param_groups] == [3, 3]
        other = lingrad.wrap(layer(), "svd(rank=2)", Counting, lr=0.1)
        other.load_state_dict(optimizer.state_dict())
        backward(model)
        other.step()
        assert [group["k"] for group in other.base.param_groups] == [4, 4]

    @pytest.mark.parametrize(("carry", "expected"), [("keep", 5.0), ("reset", 3.0)])
    def test_what_a_base_has_before_its_first_step_is_there_and_after_a_reset_again(self, carry, expected):
        model = layer()
        optimizer = lingrad.wrap(model, "svd(rank=2, every=2)", Counting, carry=carry, lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        assert bool((optimizer.state[optimizer.subspaces[0].coords]["sum"] == expected).all())

    def test_a_single_coordinate_rotates_as_any(self):
        """Its moment is one number, like a step counter's."""
        model = layer(1, 1, bias=False)
        optimizer = lingrad.wrap(model, "svd(rank=1, every=2, align=false)", "sgd", momentum=0.9, lr=0.1, carry="rotate")
        (sub,) = optimizer.subspaces
        x = torch.ones(1, 1, dtype=torch.float64)
        for sign in (1.0, 1.0):
            optimizer.zero_grad()
            (model(x) * sign).sum().backward()
            optimizer.step()
        flipped = Bases(*(None if b is None else -b for b in sub.state))
        sub.replace_state(flipped, sub.refreshes)
        moment = optimizer.state[sub.coords]["momentum_buffer"].clone()
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        overlap = float(sub.map().tensors[0] * next(b for b in flipped if b is not None))
        expected = 0.9 * overlap * moment + sub.coords.grad
        torch.testing.assert_close(optimizer.state[sub.coords]["momentum_buffer"], expected, rtol=1e-12, atol=1e-12)
        assert overlap == pytest.approx(-1.0)


class TestStructure:
    @each_mode
    def test_detaching_twice_does_nothing_and_stepping_afterwards_is_refused(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
        backward(model)
        optimizer.step()
        optimizer.detach()
        optimizer.detach()
        assert optimizer.mode is None
        for call in (optimizer.step, lambda: optimizer.switch("adapter"), optimizer.state_dict):
            with pytest.raises(
                ModeError, match="this optimizer was detached from its model; call lingrad.wrap or lingrad.adapt"
            ):
                call()
        MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)

    @each_mode
    def test_a_model_is_wrapped_once(self, mode):
        model = layer()
        MODES[mode](model, "svd(rank=2)", lr=0.1)
        with pytest.raises(ModeError, match="'0.weight' is wrapped already; call detach"):
            MODES[mode](model, "svd(rank=2)", lr=0.1)
        with pytest.raises(ModeError, match="'0.weight' is in a copy of a wrapped model, which is good for evaluation only"):
            MODES[mode](copy.deepcopy(model), "svd(rank=2)", lr=0.1)

    @each_mode
    def test_the_optimizer_is_not_copied_or_pickled(self, mode):
        optimizer = MODES[mode](layer(), "svd(rank=2)", lr=0.1)
        for duplicate in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(
                ModeError, match=r"cannot be copied or pickled; save opt.state_dict\(\) and model.state_dict\(\)"
            ):
                duplicate(optimizer)

    @pytest.mark.parametrize("build", [llama, zoo, lambda: llama(tie_word_embeddings=True)])
    @each_mode
    def test_detach_gives_the_model_back(self, build, mode):
        plain, model = build(), build()
        rules = {"*": "svd(rank=1)"}
        kinds = {name: type(m) for name, m in plain.named_modules()}
        optimizer = MODES[mode](model, rules, lr=1e-2)
        optimizer.switch("adapter" if mode == "optimizer" else "optimizer")
        optimizer.detach()
        assert {name: type(m) for name, m in model.named_modules()} == kinds
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
            (n, p.requires_grad) for n, p in plain.named_parameters()
        ]
        assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))

    def test_optimizer_mode_saves_the_plain_model(self):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
        train(model, optimizer, text_batches(2))
        assert model.state_dict().keys() == llama().state_dict().keys()
        llama().load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(llama().state_dict(), strict=True)

    def test_adapter_mode_saves_the_coordinates(self):
        model = llama()
        optimizer = lingrad.adapt(model, "svd(rank=4)", lr=1e-2)
        train(model, optimizer, text_batches(2))
        saved = model.state_dict()
        extra = saved.keys() - llama().state_dict().keys()
        assert extra == {f"{sub.name.removesuffix('.weight')}.lingrad.coords" for sub in optimizer.subspaces}
        assert all(saved[key].any() for key in extra)
        other = llama()
        lingrad.wrap(other, "svd(rank=4)", lr=1e-2)
        with pytest.raises(RuntimeError, match=r"was saved in adapter mode, but the state.* holds no coordinates"):
            other.load_state_dict(saved)
        with pytest.raises(
            RuntimeError, match=r"there is no .*coords: the file is of a plain model.*switch\('optimizer'\) before"
        ):
            model.load_state_dict(llama().state_dict())

    def test_switching_to_an_unknown_mode(self):
        optimizer = lingrad.wrap(layer(), "svd(rank=2)", lr=0.1)
        with pytest.raises(SpecError, match="mode must be one of optimizer, adapter, not 'adaptor'; did you mean 'adapter'"):
            optimizer.switch("adaptor")
        optimizer.switch("optimizer")
        assert optimizer.mode == "optimizer"

    def test_switching_in_the_middle_of_micro_batches(self):
        weights = []
        for switched in (False, True):
            model = llama()
            optimizer = lingrad.wrap(model, "svd(rank=4, every=2)", lr=1e-2)
            for batch in text_batches(4):
                optimizer.zero_grad()
                for i, ids in enumerate(batch):
                    if switched and i == 1:
                        optimizer.switch("adapter" if optimizer.mode == "optimizer" else "optimizer")
                    text_loss(model, ids).backward()
                optimizer.step()
            optimizer.detach()
            weights.append(dict(model.named_parameters()))
        assert gap(*weights) <= 1e-12

    def test_weights_are_those_of_the_forward(self):
        model = llama()
        optimizer = lingrad.adapt(model, "svd(rank=4)", lr=1e-2)
        train(model, optimizer, text_batches(3))
        plain = llama()
        weights = optimizer.weights()
        assert weights.keys() == dict(plain.named_parameters()).keys()
        plain.load_state_dict(weights)
        ids = text_batches(1)[0][0]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)

    def test_seeds_come_from_the_run_and_the_name(self):
        def bases(seed):
            optimizer = lingrad.wrap(llama(), "random(rank=4)", lr=1e-2, seed=seed)
            return [sub.map().tensors[0] for sub in optimizer.subspaces]

        torch.rand(3)
        assert all(torch.equal(a, b) for a, b in zip(bases(0), bases(0), strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(bases(0), bases(1), strict=True))
        same_shape = [b for b in bases(0) if b.shape == (32, 4)]
        assert not torch.equal(same_shape[0], same_shape[1])

    def test_nothing_touches_the_global_generator(self):
        torch.manual_seed(5)
        expected = torch.rand(1)
        model = layer()
        torch.manual_seed(5)
        optimizer = lingrad.wrap(model, "random(rank=2, every=1)", lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        assert torch.equal(torch.rand(1), expected)

    def test_a_copied_model_evaluates_alike(self):
        for mode in MODES:
            model = llama()
            optimizer = MODES[mode](model, "svd(rank=4)", lr=1e-2)
            train(model, optimizer, text_batches(2))
            ids = text_batches(1)[0][0]
            with torch.no_grad():
                assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
