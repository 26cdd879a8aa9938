"""Gradients that are bad, missing or not finite, and factorisations that fail."""

import contextlib
import copy
import math
import warnings

import pytest
import torch
from torch import nn

from lingrad.testing.training import every_kind
from tests.support.models import gap, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode
from tests.support.small import EVERYTHING, EXACT, close, inputs, named, squared, stack, teach, twins


class TestGradients:
    @each_mode
    @pytest.mark.parametrize("every", [0, 2], ids=["off a refresh", "at a refresh"])
    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
    @pytest.mark.parametrize(("base", "stock"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
    def test_a_bad_gradient_does_what_it_does_to_the_stock_optimizer(self, mode, every, value, base, stock):
        """The old basis stays, so that the run is the stock optimizer's on coordinates z of W0 + S z with the first S."""
        options = {"lr": 0.05, **({"momentum": 0.9} if base == "sgd" else {"weight_decay": 0.0})}
        losses = [1.0, 1.0, value, 1.0]
        model = twins()[:1]
        start = model[0].weight.detach().clone()
        optimizer = MODES[mode](model, f"svd(rank=2, every={every})", base, **options)
        (sub,) = optimizer.subspaces
        found, messages = [], []
        for step, factor in enumerate(losses):
            optimizer.zero_grad()
            (squared(model[0], inputs(step)) * factor).backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            messages += [str(w.message) for w in caught]
            found.append(optimizer.weights()["0.weight"].clone())
        at_refresh = every == 2 and not math.isfinite(value)
        said = "0.weight: the gradient's norm at a refresh is not finite; the old basis stays until the next one"
        assert messages == [said] * at_refresh
        assert sub.basis.refreshes == 1

        coords = nn.Parameter(torch.zeros_like(sub.coords))
        reference = stock([coords], **options)
        for step, factor in enumerate(losses):
            reference.zero_grad()
            weight = start + sub.map().lift(coords)
            (nn.functional.linear(inputs(step), weight).tanh().square().sum() * factor).backward()
            reference.step()
            expected = start + sub.map().lift(coords.detach())
            finite = expected.isfinite()
            assert torch.equal(found[step].isfinite(), finite)
            close(found[step][finite], expected[finite])
            assert bool(finite.all()) == (step < 2 or value == 0.0)

    @each_mode
    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
    @pytest.mark.parametrize(("base", "stock"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
    def test_in_full_rank_it_is_the_stock_optimizer_s_own_run(self, mode, value, base, stock):
        runs = []
        for wrapped in (False, True):
            model = stack()
            if wrapped:
                optimizer = MODES[mode](model, {"*": "full()"}, base, lr=0.05, weight_decay=0.1)
            else:
                decay = 0.1 if base == "adamw" else 0.0
                optimizer = stock(model.parameters(), lr=0.05, weight_decay=decay)
            runs.append([])
            for step, factor in enumerate([1.0, value, 1.0]):
                optimizer.zero_grad()
                (squared(model, inputs(step)) * factor).backward()
                if not wrapped and base == "sgd":  # lingrad's decay is decoupled whatever the base
                    with torch.no_grad():
                        for p in model.parameters():
                            p.mul_(1 - 0.05 * 0.1)
                optimizer.step()
                weights = optimizer.weights() if wrapped else named(model)
                runs[-1].append({name: w.detach().clone() for name, w in weights.items()})
        for plain, ours in zip(*runs, strict=True):
            for name, expected in plain.items():
                finite = expected.isfinite()
                assert torch.equal(ours[name].isfinite(), finite)
                close(ours[name][finite], expected[finite])
        assert all(w.isfinite().all() for w in runs[0][-1].values()) == (value == 0.0)

    @each_mode
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_bad_gradient_of_one_weight_spoils_no_other(self, mode, value):
        model = twins()
        optimizer = MODES[mode](model, "svd(rank=2, every=2)", lr=0.05, weight_decay=0.1)
        good, bad = optimizer.subspaces
        bases = []
        for step in range(5):
            optimizer.zero_grad()
            squared(model[0], inputs(step)).backward()
            (squared(model[1], inputs(step)) * (value if step == 2 else 1.0)).backward()
            with pytest.warns(RuntimeWarning, match="1.weight: the gradient") if step == 2 else contextlib.nullcontext():
                optimizer.step()
            bases.append([sub.map().tensors[0].clone() for sub in (good, bad)])
            if step == 3:
                break  # from here on the spoilt weight itself gives gradients that are not finite
        assert good.basis.refreshes == 2
        assert bad.basis.refreshes == 1
        assert not torch.equal(bases[2][0], bases[1][0])
        assert torch.equal(bases[2][1], bases[1][1])
        weights = optimizer.weights()
        assert weights["0.weight"].isfinite().all()
        assert not weights["1.weight"].isfinite().any()

    @each_mode
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize(
        "spec_", ["svd(rank=2, every=2)", "power(rank=2, every=1)", "pca(rank=2)", "random(rank=2, every=2)"]
    )
    def test_a_micro_batch_thrown_away_leaves_no_trace(self, mode, value, spec_):
        """A loop that looks at its loss, and skips the step where it is not finite."""
        weights = []
        for spoilt in (False, True):
            model = stack()
            optimizer = MODES[mode](model, {"*": spec_}, lr=0.05)
            for step in range(5):
                if spoilt:  # on refresh steps and off them
                    optimizer.zero_grad()
                    (squared(model, inputs(99)) * value).backward()
                optimizer.zero_grad()
                squared(model, inputs(step)).backward()
                optimizer.step()
            weights.append(optimizer.weights())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    @each_mode
    def test_gradients_from_before_the_optimizer_are_forgotten_by_zero_grad(self, mode):
        """As by any optimizer's: each weight, however its gradient is born, goes by the one after zero_grad alone."""
        plain, model = every_kind(), every_kind()
        old, new = zoo_batches(2, micro=1)
        zoo_loss(plain, new[0]).backward()
        zoo_loss(model, old[0]).backward()
        optimizer = MODES[mode](model, EVERYTHING, "sgd", lr=0.1)
        optimizer.zero_grad()
        zoo_loss(model, new[0]).backward()
        expected = {name: p.grad for name, p in plain.named_parameters()}
        for sub in optimizer.subspaces:
            close(sub.pending.total.dense(), sub.weight.layout.matrix(expected[sub.name]))


def fail(*_, **__):
    raise torch.linalg.LinAlgError("did not converge")


class TestSVDFailure:
    @each_mode
    @pytest.mark.parametrize("side", ["short", "long", "both"])
    def test_an_exact_svd_that_fails_is_one_of_the_gram_matrix(self, monkeypatch, mode, side):
        weights = []
        for solver in ("gram", "exact"):
            model = stack()
            optimizer = MODES[mode](model, f"svd(rank=3, every=2, side={side}, solver={solver})", lr=0.05)
            if solver == "exact":
                monkeypatch.setattr(torch.linalg, "svd", fail)
            for step in range(5):
                optimizer.zero_grad()
                squared(model, inputs(step)).backward()
                due = solver == "exact" and step % 2 == 0
                with pytest.warns(RuntimeWarning, match="the SVD did not converge") if due else contextlib.nullcontext():
                    optimizer.step()
            assert all(sub.basis.refreshes == 3 for sub in optimizer.subspaces)
            weights.append(optimizer.weights())
        assert gap(*weights) <= EXACT

    @each_mode
    @pytest.mark.parametrize("spec_", ["svd(rank=3, every=2, solver=randomized)", "pca(rank=3, every=2)"])
    def test_a_randomized_svd_that_fails_falls_back_too(self, monkeypatch, mode, spec_):
        """The first refresh of pca takes the same road."""
        model = stack()
        optimizer = MODES[mode](model, spec_, lr=0.05)
        monkeypatch.setattr(torch.linalg, "svd", fail)
        before = [sub.map().tensors[0].clone() for sub in optimizer.subspaces]
        squared(model, inputs()).backward()
        with pytest.warns(RuntimeWarning, match="did not converge"):
            optimizer.step()
        for sub, old in zip(optimizer.subspaces, before, strict=True):
            (basis,) = sub.map().tensors
            # a Gram matrix is blind below sqrt(eps) = 1e-8, and its vectors are as orthonormal as eigh makes them
            close(basis.t() @ basis, torch.eye(3, dtype=torch.float64), 1e-8)
            assert not torch.equal(basis, old)
        assert all(w.isfinite().all() for w in optimizer.weights().values())

    @each_mode
    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("solver", ["exact", "randomized"])
    def test_a_failed_svd_of_a_gradient_of_low_rank(self, monkeypatch, mode, side, solver):
        """One token gives a gradient of rank 1; the other columns are filled up, as they are where the SVD succeeds."""
        model = stack()
        optimizer = MODES[mode](model, f"svd(rank=3, side={side}, solver={solver})", "sgd", lr=0.05)
        monkeypatch.setattr(torch.linalg, "svd", fail)
        squared(model, inputs()[:1]).backward()
        with pytest.warns(RuntimeWarning, match="did not converge"):
            optimizer.step()
        for sub in optimizer.subspaces:
            for basis in sub.map().tensors:
                close(basis.t() @ basis, torch.eye(3, dtype=torch.float64), 1e-8)  # what a Gram matrix can tell

    @each_mode
    def test_a_run_goes_on_after_one_failure(self, monkeypatch, mode):
        model = stack()
        optimizer = MODES[mode](model, "svd(rank=3, every=1)", lr=0.05)
        for step in range(4):
            optimizer.zero_grad()
            squared(model, inputs(step)).backward()
            if step != 2:
                optimizer.step()
                continue
            with monkeypatch.context() as patched:
                patched.setattr(torch.linalg, "svd", fail)
                with pytest.warns(RuntimeWarning, match="the SVD did not converge"):
                    optimizer.step()
        assert all(sub.basis.refreshes == 4 for sub in optimizer.subspaces)


class TestMissingGradients:
    @each_mode
    @pytest.mark.parametrize("every", [0, 2], ids=["off a refresh", "at a refresh"])
    def test_a_weight_left_out_of_a_step_stands_still_in_it(self, mode, every):
        """Its run is the one without that step; a refresh it missed waits for the next one."""
        found = []
        for used in ((0, 1, 2, 3), (0, 1, 3)):
            model = twins()
            optimizer = MODES[mode](model, f"svd(rank=2, every={every})", lr=0.05, weight_decay=0.5)
            other, sub = optimizer.subspaces
            seeds = iter(range(10))
            for step in range(4):
                before = optimizer.weights()["1.weight"].clone()
                optimizer.zero_grad()
                squared(model[0], inputs(step)).backward()
                if step in used:
                    squared(model[1], inputs(next(seeds))).backward()
                optimizer.step()
                assert torch.equal(before, optimizer.weights()["1.weight"]) == (step not in used)
                if len(found) == 0 and step == 2:  # the three gradients the second run sees, with one basis
                    found.append((optimizer.weights()["1.weight"].clone(), sub.basis.refreshes))
            assert other.basis.refreshes == (1 if every == 0 else 2)
        found.append((optimizer.weights()["1.weight"], sub.basis.refreshes))
        assert found[1][1] == 1
        if every == 0:
            close(found[1][0], found[0][0])
        else:  # the run that did not miss its refresh has moved to another basis
            assert found[0][1] == 2
            assert not torch.allclose(found[1][0], found[0][0])

    @each_mode
    def test_a_refresh_that_was_missed_keeps_basis_and_moments(self, mode):
        """With every=2 and no gradient in the third step, the fourth goes on as with every=0."""
        weights = []
        for every, used in ((0, (0, 1, 2)), (2, (0, 1, 3))):
            model = twins()
            optimizer = MODES[mode](model, f"svd(rank=2, every={every})", lr=0.05, weight_decay=0.5)
            seeds = iter(range(10))
            for step in range(used[-1] + 1):
                optimizer.zero_grad()
                if step in used:
                    squared(model[1], inputs(next(seeds))).backward()
                optimizer.step()
            assert [sub.basis.refreshes for sub in optimizer.subspaces] == [0, 1]
            weights.append(optimizer.weights())
        assert gap(*weights) <= EXACT

    @each_mode
    def test_gradients_left_at_zero_count_as_gradients(self, mode):
        """zero_grad(set_to_none=False) and no backward: momentum and decay go on, as they do in torch."""
        weights = []
        for wrapped in (False, True):
            model = stack()
            if wrapped:
                optimizer = MODES[mode](model, {"*": "full()"}, lr=0.05, weight_decay=0.1)
            else:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
            for step in range(4):
                optimizer.zero_grad(set_to_none=False)
                if step % 2 == 0:
                    squared(model, inputs(step)).backward()
                optimizer.step()
            weights.append(optimizer.weights() if wrapped else named(model))
        assert gap(*weights) <= EXACT

    def test_gradients_left_at_zero_at_a_refresh(self):
        weights = []
        for mode in MODES:
            model = stack()
            optimizer = MODES[mode](model, {"*": "svd(rank=2, every=1)"}, lr=0.05, weight_decay=0.1)
            for step in range(4):
                before = [sub.map().tensors[0].clone() for sub in optimizer.subspaces]
                optimizer.zero_grad(set_to_none=False)
                if step % 2 == 0:
                    squared(model, inputs(step)).backward()
                optimizer.step()
                for sub, old in zip(optimizer.subspaces, before, strict=True):
                    assert torch.equal(sub.map().tensors[0], old) == (step % 2 != 0)
            weights.append(optimizer.weights())
        assert gap(*weights) <= EXACT

    @each_mode
    def test_frozen_and_unused_parameters(self, mode):
        """They stay what they are, and the others' run is plain training's."""
        runs = []
        for wrapped in (False, True):
            model = every_kind()
            torch.manual_seed(0)
            model.unused = nn.Linear(4, 4).double()
            start = {name: p.detach().clone() for name, p in model.named_parameters()}
            for layer in (model.conv, model.middle, model.biased):
                layer.weight.requires_grad_(False)
            if wrapped:
                optimizer = MODES[mode](model, {"*": "full()"}, lr=0.01, weight_decay=0.1)
                assert {sub.name for sub in optimizer.subspaces} == {
                    "embed.weight",
                    "experts.gate_up_proj",
                    "head.weight",
                    "unused.weight",
                }
            else:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
            teach(model, optimizer, zoo_batches(5))
            if wrapped:
                optimizer.detach()
            runs.append(named(model))
            same = {name for name, p in model.named_parameters() if torch.equal(p, start[name])}
            assert same == {"conv.weight", "middle.weight", "biased.weight", "unused.weight", "unused.bias"}
            frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
            assert frozen == {"conv.weight", "middle.weight", "biased.weight"}
            assert all(named(model)[name].grad is None for name in frozen)
        assert gap(*runs) <= EXACT

    @each_mode
    def test_a_state_with_a_weight_that_was_never_used(self, mode):
        def made():
            model = twins()
            return model, MODES[mode](model, "svd(rank=2, every=2)", lr=0.05)

        def steps(model, optimizer, seeds):
            for seed in seeds:
                optimizer.zero_grad()
                squared(model[0], inputs(seed)).backward()
                optimizer.step()

        model, optimizer = made()
        steps(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        other, resumed = made()
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        for m, o in ((model, optimizer), (other, resumed)):
            steps(m, o, range(3, 6))
            o.zero_grad()
            squared(m[1], inputs()).backward()  # its first gradient comes late
            o.step()
            assert o.subspaces[1].basis.refreshes == 1
        assert all(torch.equal(optimizer.weights()[name], resumed.weights()[name]) for name in optimizer.weights())
