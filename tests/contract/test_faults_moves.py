"""Models that are cast, moved, copied or dropped in mid-run."""

import copy
import gc
import io
import re
import weakref

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import LingradError, ModeError
from lingrad.testing.training import every_kind
from tests.support.models import gap, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode
from tests.support.small import EVERYTHING, close, inputs, named, squared, stack, teach

CASTS = [
    # (from, to, tolerance): float32 rounds by 6e-8 and bfloat16 by 4e-3, in each of five steps and each of a few operations
    (torch.float64, torch.float32, 1e-5),
    (torch.float32, torch.float64, 1e-5),
    (torch.float32, torch.bfloat16, 3e-2),
]


class TestMoving:
    @each_mode
    @pytest.mark.parametrize("rules", ["svd(rank=2, every=2)", EVERYTHING], ids=["linears", "every weight"])
    @pytest.mark.parametrize(("before", "after", "tolerance"), CASTS)
    @pytest.mark.parametrize("base", ["sgd", "adamw"])
    def test_a_step_after_a_cast_works_or_is_refused_in_words(self, mode, rules, before, after, tolerance, base):
        model = every_kind(before)
        optimizer = MODES[mode](model, rules, base, lr=0.01)
        teach(model, optimizer, zoo_batches(3))
        start = {name: w.detach().clone() for name, w in optimizer.weights().items()}
        model.to(after)
        assert all(sub.coords.dtype == torch.promote_types(after, torch.float32) for sub in optimizer.subspaces)
        for name, weight in optimizer.weights().items():
            torch.testing.assert_close(weight, start[name].to(after), rtol=tolerance, atol=tolerance)
        refusal = None
        try:
            teach(model, optimizer, zoo_batches(4))
        except LingradError as error:
            refusal = str(error)
        if refusal is not None:
            assert re.search("dtype|cast", refusal)
            return
        weights = optimizer.weights()
        assert all(w.dtype == after and w.isfinite().all() for w in weights.values())
        assert any(not torch.equal(w, start[name].to(after)) for name, w in weights.items())
        optimizer.detach()
        assert {p.dtype for p in model.parameters()} == {after}

    @each_mode
    @pytest.mark.parametrize(("before", "after", "tolerance"), CASTS)
    def test_plain_sgd_goes_on_in_the_new_dtype(self, mode, before, after, tolerance):
        """It has no state that could stand in the way."""
        plain, model = every_kind(before), every_kind(before)
        stock = torch.optim.SGD(plain.parameters(), lr=0.05)
        optimizer = MODES[mode](model, {"*": "full()"}, "sgd", lr=0.05)
        for m, o in ((plain, stock), (model, optimizer)):
            teach(m, o, zoo_batches(2))
            m.to(after)
            teach(m, o, zoo_batches(3, seed=2))
        optimizer.detach()
        for name, weight in plain.named_parameters():
            torch.testing.assert_close(named(model)[name], weight, rtol=tolerance, atol=tolerance)

    @each_mode
    @pytest.mark.parametrize("every", [1, 5], ids=["at a refresh", "off a refresh"])
    @pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
    def test_a_cast_between_backward_and_step(self, mode, every, before, after):
        """model.to casts gradients with the weights, so that plain torch takes the step."""
        weights = []
        for cast in (False, True):
            model = stack(dtype=before)
            optimizer = MODES[mode](model, f"svd(rank=2, every={every})", "sgd", lr=0.05)
            for step in range(2):
                optimizer.zero_grad()
                squared(model, inputs(step, dtype=before)).backward()
                if cast and step == 1:
                    model.to(after)
                optimizer.step()
            weights.append({name: w.double() for name, w in optimizer.weights().items()})
        assert gap(*weights) <= 1e-5  # float32 rounds by 6e-8, in each of some hundred sums

    @each_mode
    @pytest.mark.parametrize("rules", ["svd(rank=2)", EVERYTHING], ids=["linears", "every weight"])
    def test_a_model_moved_to_meta_is_refused_in_words(self, mode, rules):
        """A move to the meta device throws away weights, coordinates and bases: a run cannot go on from there."""
        model = every_kind()
        optimizer = MODES[mode](model, rules, "sgd", lr=0.01)
        teach(model, optimizer, zoo_batches(2))

        def go_on():
            model.to("meta")
            optimizer.step()

        with pytest.raises(LingradError, match="meta"):
            go_on()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": saved_and_loaded}


class TestCopies:
    def trained(self, mode, rules):
        model = every_kind(middle=lambda: nn.Linear(10, 14))  # all linears are plain ones
        optimizer = MODES[mode](model, rules, lr=0.01)
        teach(model, optimizer, zoo_batches(3))
        return model, optimizer

    def rules(self, mode, how):
        # torch refuses to pickle parametrized modules, which other weights than linears are in adapter mode
        linears = [
            name for name, module in every_kind(middle=lambda: nn.Linear(10, 14)).named_modules() if type(module) is nn.Linear
        ]
        return dict.fromkeys(linears, "svd(rank=2, every=2)") if (mode, how) == ("adapter", "torch.save") else EVERYTHING

    @each_mode
    @pytest.mark.parametrize("how", COPIES)
    def test_a_copy_evaluates_alike_and_apart(self, mode, how):
        model, optimizer = self.trained(mode, self.rules(mode, how))
        ids = zoo_batches(1)[0][0]
        duplicate = COPIES[how](model)
        with torch.no_grad():
            expected = model(ids)
            assert torch.equal(duplicate(ids), expected)
        zoo_loss(duplicate, ids).backward()  # of no use to anybody, and no crash
        assert all(sub.pending.total is None for sub in optimizer.subspaces)
        teach(model, optimizer, zoo_batches(2))
        with torch.no_grad():
            assert torch.equal(duplicate(ids), expected)
            assert not torch.equal(model(ids), expected)

    @each_mode
    @pytest.mark.parametrize("how", COPIES)
    @pytest.mark.parametrize("given", ["model", "parameters"])
    def test_wrapping_a_copy_is_refused(self, mode, how, given):
        model, _ = self.trained(mode, self.rules(mode, how))
        duplicate = COPIES[how](model)
        with pytest.raises(ModeError, match="is in a copy of a wrapped model, which is good for evaluation only"):
            lingrad.wrap(duplicate if given == "model" else list(duplicate.named_parameters()), {"*": "svd(rank=1)"}, lr=0.1)

    def test_torch_s_own_refusal_of_parametrized_modules_names_the_way_out(self):
        model, _ = self.trained("adapter", EVERYTHING)
        with pytest.raises(RuntimeError, match=r"parametrized modules is only supported through state_dict\(\)"):
            saved_and_loaded(model)

    @each_mode
    @pytest.mark.parametrize("how", COPIES)
    def test_a_copy_made_after_detach_is_a_model_like_any(self, mode, how):
        model, optimizer = self.trained(mode, EVERYTHING)
        optimizer.detach()
        duplicate = COPIES[how](model)
        for m in (model, duplicate):
            teach(m, MODES[mode](m, EVERYTHING, lr=0.01), zoo_batches(2))
        ids = zoo_batches(1)[0][0]
        with torch.no_grad():
            assert torch.equal(duplicate(ids), model(ids))


class TestLettingGo:
    @each_mode
    def test_a_model_outlives_its_optimizer(self, mode):
        model = every_kind()
        optimizer = MODES[mode](model, EVERYTHING, lr=0.01)
        teach(model, optimizer, zoo_batches(3))
        ids = zoo_batches(1)[0][0]
        with torch.no_grad():
            expected = model(ids)
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None  # nothing in the model holds it
        for _ in range(2):
            zoo_loss(model, ids).backward()
        with torch.no_grad():
            assert torch.equal(model(ids), expected)

    @each_mode
    def test_detach_gives_back_the_plain_model(self, mode):
        """Parameters, their names, order, type and requires_grad, the users' hooks, and not one attribute more."""

        def build():
            model = every_kind()
            model.conv.bias.requires_grad_(False)
            model.embed.weight.requires_grad_(False)
            model.register_buffer("steps", torch.zeros(3))
            model.biased.register_forward_hook(lambda module, args, out: out * 2)
            model.conv.register_forward_pre_hook(lambda module, args: None)
            return model.eval()

        def description(model):
            return (
                [(name, type(p), p.requires_grad, p.dtype, vars(p)) for name, p in model.named_parameters()],
                [name for name, _ in model.named_buffers()],
                list(model.state_dict()),
                [
                    (name, type(m), m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
                    for name, m in model.named_modules()
                ],
                [len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in model.parameters()],
                [p.is_leaf and p.grad is None for p in model.parameters()],
            )

        model = build()
        expected = description(model)
        params = list(model.parameters())
        optimizer = MODES[mode](model, EVERYTHING, lr=0.01)
        teach(model, optimizer, zoo_batches(5))
        weights = {name: w.detach().clone() for name, w in optimizer.weights().items()}
        model.zero_grad()
        optimizer.detach()
        assert description(model) == expected
        assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
        for name, weight in weights.items():
            close(named(model)[name].detach(), weight)
        for module in model.modules():  # nor in the hooks' own books
            for hooks in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called, module._forward_pre_hooks):
                assert not any("lingrad" in repr(hook) for hook in hooks.values())
