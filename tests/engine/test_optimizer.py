"""The step: its order, what it reads, what it leaves behind, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import ModeError, SpecError
from lingrad.transforms import Sides
from tests.support.layers import backward, inputs, layer
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo
from tests.support.runs import MODES, each_mode


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
        wrapped = {id(sub.weight.param) for sub in optimizer.subspaces}  # they train by their coordinates
        assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad} - wrapped

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
        flipped = Sides(*(None if b is None else -b for b in sub.basis.state))
        sub.basis.replace(flipped, sub.basis.refreshes)
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
        optimizer = lingrad.adapt(model, "svd(rank=4)", lr=1e-2, self_contained=False)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("inf")}, "lr must be a number, 0 or more, not inf"),
        ({"lr": float("nan")}, "lr must be a number, 0 or more, not nan"),
        ({"lr": 10**400}, "lr must be a number, 0 or more, not a whole number of about 400 digits"),
        ({"lr": 1e-2, "capturable": True}, "capturable=True is for parameters on a GPU, and weight is on the CPU"),
    ],
)
@pytest.mark.parametrize("make", [lingrad.wrap, lingrad.adapt])
def test_options_that_no_step_can_be_made_with(make, options, message):
    with pytest.raises(SpecError, match=message):
        make(nn.Linear(4, 4), "svd(rank=1)", **options)
