"""Refreshes: what they gather, when they take effect, how much they capture, and what they cost a step."""

import warnings

import pytest
import torch
from torch import nn

import lingrad
from lingrad.config import spec
from lingrad.errors import CheckpointError, ModeError, SpecError
from lingrad.gradients.local import DenseGradient
from lingrad.transforms import When
from lingrad.transforms.sketch import range_probes
from tests.support.models import gap, llama, text_batches, text_loss, train
from tests.support.runs import MODES, each_mode
from tests.support.watch import NoTensorOfShape

# rank + oversample stays below every m and n of the small Llama, whose layers are 32 x 32 and 88 x 32
SKETCHED = (
    "svd(rank=4, every=2, side={side}, solver=randomized)",
    "power(rank=4, every=2, side={side})",
    "pca(rank=4, every=2, side={side})",
    "kron(left=power(rank=4, every=2), right=svd(rank=3, every=2, solver=randomized, oversample=1))",
    "kron(left=pca(rank=4, every=2), right=random(rank=3, every=2))",
)


def layer(m=24, n=20):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, m)).double()


def inputs(seed=1, rows=50, n=20):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(model, seed=1):
    (model(inputs(seed)).sigmoid() * torch.linspace(0, 3, model[0].out_features)).square().sum().backward()


class TestSketches:
    @pytest.mark.thinned(3)
    @each_mode
    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("text", [*SKETCHED, "random(rank=4, every=2, side={side})"])
    def test_no_gradient_is_ever_formed(self, mode, side, text):
        """Not at a refresh, not in its first step, not with micro-batches of more tokens than the matrix has rows."""
        model = llama(num_key_value_heads=4)  # none of 16 x 32, which is the shape of the witnesses' products
        optimizer = MODES[mode](model, text.format(side=side), lr=1e-2)
        shapes = [sub.weight.layout.shape for sub in optimizer.subspaces]
        for micro_batches in text_batches(3, micro=3, rows=9):  # 3 x 108 tokens
            optimizer.zero_grad()
            with NoTensorOfShape(shapes) as watch:
                for batch in micro_batches:
                    text_loss(model, batch).backward()
            # adapter mode forms W + S z where there are so many tokens
            assert {name for name, _ in watch.found} == ({"aten::addmm"} if mode == "adapter" else set())
            optimizer.step()
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}

    def test_one_that_reads_the_gradient_does_form_it(self):
        """So that the check above can fail."""
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
        with NoTensorOfShape([sub.weight.layout.shape for sub in optimizer.subspaces]) as watch:
            text_loss(model, text_batches(1, micro=1, rows=9)[0][0]).backward()
        assert watch.found

    @each_mode
    @pytest.mark.parametrize("text", SKETCHED)
    def test_the_products_are_those_of_the_whole_gradient(self, mode, text):
        """Of a step's three micro-batches together, in both modes; the basis is the one the transform learns from them."""
        model = layer()
        optimizer = MODES[mode](model, text.format(side="right"), "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        for step in range(3):
            optimizer.zero_grad()
            weight = optimizer.weights()["0.weight"].detach().clone().requires_grad_()
            for seed in range(3):
                backward(model, 10 * step + seed)
                y = nn.functional.linear(inputs(10 * step + seed), weight, model[0].bias.detach())
                (y.sigmoid() * torch.linspace(0, 3, 24)).square().sum().backward()
            transform, state, due = sub.basis.transform, sub.basis.state, sub.basis.due
            assert due == (step % 2 == 0)
            optimizer.step()
            if due:
                expected = transform.refresh(
                    state, DenseGradient(weight.grad), When(step, step // 2, sub.basis.when.seed, (24, 20), 0)
                )
                for one, other in zip(sub.map().tensors, transform.map(expected).tensors, strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            assert sub.basis.refreshes == 1 + step // 2

    @each_mode
    def test_the_step_itself_uses_the_old_basis_and_the_next_one_the_new(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "svd(rank=4, every=2, side=left, solver=randomized)", "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        start = sub.map().left.clone()
        torch.testing.assert_close(start.t() @ start, torch.eye(4, dtype=torch.float64))  # a step is trained in it
        bases = []
        for step in range(4):
            optimizer.zero_grad()
            before = optimizer.weights()["0.weight"].clone()
            bases.append(sub.map().left.clone())
            backward(model, step)
            optimizer.step()
            moved = optimizer.weights()["0.weight"] - before
            torch.testing.assert_close(bases[-1] @ bases[-1].t() @ moved, moved, rtol=0, atol=1e-12)
        assert torch.equal(bases[0], start)
        assert torch.equal(bases[1], bases[2])
        assert not torch.equal(bases[0], bases[1])
        assert not torch.equal(bases[2], bases[3])

    @each_mode
    def test_scaling_from_outside_does_not_matter(self, mode):
        """Neither a factor nor any other change of the gradient reaches a sketch: there is nothing to carry over."""
        weights = []
        for scale in (1.0, 1024.0):
            model = layer()
            optimizer = MODES[mode](model, "power(rank=4, every=2)", "sgd", lr=0.1)
            for step in range(5):
                optimizer.zero_grad()
                (inputs(step) @ model[0].weight.detach().t()).sum()  # a forward that is not ours
                (scale * model(inputs(step)).sigmoid().square().sum()).backward()
                for param in model.parameters():
                    if param.grad is not None:
                        param.grad.div_(scale)
                optimizer.step()
            weights.append(optimizer.weights())
        assert gap(*weights) <= 1e-12

    @each_mode
    @pytest.mark.parametrize("how", ["optimizer", "model", "zeros", "by hand", "replaced"])
    def test_forgetting_a_gradient_forgets_its_sketch(self, mode, how):
        bases = []
        for thrown_away in (False, True):
            model = layer()
            optimizer = MODES[mode](model, "svd(rank=4, solver=randomized)", "sgd", lr=0.1)
            (sub,) = optimizer.subspaces
            if thrown_away:
                backward(model, 5)
                if how == "optimizer":
                    optimizer.zero_grad()
                elif how == "model":
                    model.zero_grad()
                elif how == "zeros":
                    model.zero_grad(set_to_none=False)
                elif how == "by hand":
                    sub.coords.grad.zero_()
                else:
                    sub.coords.grad = torch.zeros_like(sub.coords.grad)
            backward(model, 6)
            backward(model, 7)
            optimizer.step()
            bases.append(sub.map().tensors[0])
        assert torch.equal(*bases)

    @each_mode
    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_a_gradient_that_is_no_use_keeps_the_basis(self, mode, value):
        model = layer()
        optimizer = MODES[mode](model, "power(rank=4, every=2)", "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        start = sub.map().tensors[0].clone()
        (model(inputs()) * value).sum().backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        assert [str(w.message) for w in said] == (
            ["0.weight: the gradient's norm at a refresh is not finite; the old basis stays until the next one"]
            if value
            else []
        )
        assert torch.equal(sub.map().tensors[0], start)
        assert sub.basis.due  # no gradient that is any use has been seen yet
        if value == 0.0:  # the others have spoiled the weights, as they do in plain torch
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            assert sub.basis.refreshes == 1

    @each_mode
    def test_a_gradient_left_from_before_is_refused(self, mode):
        model = layer()
        optimizer = MODES[mode](model, "power(rank=4, every=2)", "sgd", lr=0.1)
        backward(model)
        optimizer.step()
        with pytest.raises(ModeError, match="is from before its basis was refreshed; call zero_grad"):
            backward(model)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        backward(model)  # no refresh in between: gradients add up, as in plain torch
        optimizer.step()

    def test_what_is_held_between_backward_and_step_is_small(self):
        """128 rows and columns, rank 4: a sketch of 8 columns and 16 witnesses, not a matrix of 128 x 128."""
        model = nn.Sequential(nn.Linear(128, 128, bias=False))
        optimizer = lingrad.wrap(model, "svd(rank=4, solver=randomized)", "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        for _ in range(3):
            model(torch.randn(500, 128)).square().sum().backward()
        assert sub.pending.nbytes == 128 * (8 + 16) * 4

    @pytest.mark.parametrize("text", ["svd(rank=4)", "power(rank=4)"])
    def test_nothing_of_it_is_held_after_the_step(self, text):
        model = layer()
        optimizer = lingrad.wrap(model, text, "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        backward(model)
        assert sub.pending.nbytes > 0
        optimizer.step()
        assert sub.pending.nbytes == 0

    def test_random_numbers_of_a_step_are_shared_and_forgotten(self):
        from lingrad.transforms.sketch import test_matrix

        test_matrix.cache_clear()
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        optimizer = lingrad.wrap(model, {"*": "svd(rank=4, every=2, side=left, solver=randomized)"}, "sgd", lr=0.1)
        model(torch.randn(5, 32)).sum().backward()
        assert test_matrix.cache_info().misses == 2  # of the sketch and of the witnesses
        optimizer.step()
        assert test_matrix.cache_info().currsize == 0

    def test_each_step_and_side_has_test_columns_of_its_own(self):
        bases, when = (torch.zeros(12, 2), torch.zeros(12, 2)), When(0, 0, 0, (12, 12))
        (_, of_left), (of_right, _) = range_probes(bases, 3, when)
        (_, again), (_, later) = (range_probes(bases, 3, w)[0] for w in (when, when._replace(step=5)))
        assert torch.equal(of_left, again)
        assert not torch.equal(of_left, of_right)
        assert not torch.equal(of_left, later)

    @pytest.mark.parametrize("text", SKETCHED[:3])
    def test_columns_point_as_those_before_did(self, text):
        """Moments that are kept refer to them."""
        model = layer()
        optimizer = lingrad.wrap(model, text.format(side="right"), "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        for seed in range(7):
            old = sub.map().right.clone()
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
            assert ((sub.map().right * old).sum(0) >= 0).all()

    @each_mode
    @pytest.mark.parametrize("text", ["svd(rank=4)", "power(rank=4)"])
    def test_a_gradient_that_was_dropped_refreshes_nothing(self, mode, text):
        model = layer()
        optimizer = MODES[mode](model, text, "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        backward(model)
        model.zero_grad()
        optimizer.step()
        assert sub.basis.refreshes == 0
        assert sub.basis.due


class TestEnergy:
    @each_mode
    @pytest.mark.parametrize("side", ["left", "right", "both"])
    def test_of_a_gradient_it_is_exact(self, mode, side):
        model = layer()
        optimizer = MODES[mode](model, f"svd(rank=4, every=2, side={side})", "sgd", lr=0.1)
        assert optimizer.captured_energy() == {}
        backward(model)
        grad = optimizer.subspaces[0].pending.total.dense().clone()
        optimizer.step()
        values = torch.linalg.svdvals(grad)
        assert optimizer.captured_energy() == {"0.weight": pytest.approx(float(values[:4].norm() / values.norm()), rel=1e-12)}

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("text", SKETCHED[:3])
    def test_of_a_sketch_it_is_near(self, text, side):
        """16 test columns; over 30 draws the mean is right to a hundredth, and none is off by more than 0.15."""
        seen = []
        for seed in range(30):
            model = layer(64, 60)
            optimizer = lingrad.wrap(model, text.format(side=side), "sgd", lr=0.0, seed=seed)
            x = inputs(n=60, rows=80)
            (model(x).sigmoid() * torch.linspace(0, 3, 64)).square().sum().backward()
            weight = model[0].weight.detach().clone().requires_grad_()
            y = nn.functional.linear(x, weight, model[0].bias.detach())
            (y.sigmoid() * torch.linspace(0, 3, 64)).square().sum().backward()
            optimizer.step()
            smap = optimizer.subspaces[0].map()
            exact = float(smap.lift(smap.project(weight.grad)).norm() / weight.grad.norm())
            seen.append((optimizer.captured_energy()["0.weight"], exact))
        found, exact = torch.tensor(seen).T
        assert (found - exact).abs().max() < 0.15
        assert abs(found.mean() - exact.mean()) < 0.01
        assert found.std() > 0  # an estimate: no basis was fitted to the witnesses

    @pytest.mark.parametrize("text", ["svd(rank=20, side=both, solver=randomized)", "power(rank=20, side=both)"])
    def test_of_two_sides_from_a_sketch_it_is_a_lower_bound(self, text):
        model = layer(64, 60)
        optimizer = lingrad.wrap(model, text, "sgd", lr=0.0)
        x = inputs(n=60, rows=80)
        weight = model[0].weight.detach().clone().requires_grad_()
        model(x).sigmoid().square().sum().backward()
        nn.functional.linear(x, weight, model[0].bias.detach()).sigmoid().square().sum().backward()
        optimizer.step()
        smap = optimizer.subspaces[0].map()
        exact = float(smap.project(weight.grad).norm() / weight.grad.norm())
        assert 0 < optimizer.captured_energy()["0.weight"] <= exact + 0.05  # each side is known to a few hundredths

    def test_what_reads_nothing_tells_nothing(self):
        model = layer()
        optimizer = lingrad.wrap(model, "random(rank=4)", "sgd", lr=0.1)
        backward(model)
        optimizer.step()
        assert optimizer.captured_energy() == {}


class TestStagger:
    def run(self, spec_, steps, mode="optimizer", **options):
        model = llama()
        optimizer = MODES[mode](model, spec_, lr=1e-2, stagger=True, **options)
        history = []
        for micro_batches in text_batches(steps, micro=1):
            before = [sub.basis.refreshes for sub in optimizer.subspaces]
            optimizer.zero_grad()
            text_loss(model, micro_batches[0]).backward()
            optimizer.step()
            history.append(sum(sub.basis.refreshes > b for sub, b in zip(optimizer.subspaces, before, strict=True)))
        return optimizer, history

    @pytest.mark.parametrize("text", ["svd(rank=4, every=7)", "power(rank=4, every=7)", "random(rank=4, every=7)"])
    def test_every_step_refreshes_two_of_fourteen_weights_and_each_its_own_every_seventh(self, text):
        optimizer, history = self.run(text, 21)
        assert len(optimizer.subspaces) == 14
        assert set(history) == {2}
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == ({3, 4} if text.startswith("random") else {3})
        assert [sub.basis.offset for sub in optimizer.subspaces] == [i // 2 for i in range(14)]

    def test_without_it_one_step_refreshes_all(self):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=4, every=7)", lr=1e-2)
        train(model, optimizer, text_batches(1))
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {1}

    @pytest.mark.parametrize(
        "text",
        ["svd(rank=4, every=5)", "power(rank=4, every=5)", "kron(left=svd(rank=4, every=5), right=random(rank=3, every=3))"],
    )
    def test_the_modes_agree(self, text):
        weights = []
        for mode in MODES:
            model = llama()
            optimizer = MODES[mode](model, text, lr=1e-2, stagger=True, weight_decay=0.1)
            train(model, optimizer, text_batches(12))
            weights.append(optimizer.weights())
        assert gap(*weights) <= 1e-12

    def test_a_gradient_is_held_for_those_whose_turn_it_is(self):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=4, every=14)", lr=1e-2, stagger=True)
        for micro_batches in text_batches(3, micro=2):
            optimizer.zero_grad()
            for batch in micro_batches:
                text_loss(model, batch).backward()
            assert sum(sub.pending.total is not None for sub in optimizer.subspaces) == 1
            optimizer.step()

    def test_it_resumes_and_is_part_of_what_a_run_is(self):
        batches = text_batches(8)
        runs = []
        for split in (False, True):
            model = llama()
            optimizer = lingrad.wrap(model, "svd(rank=4, every=5)", lr=1e-2, stagger=True)
            train(model, optimizer, batches[:3], schedule=False)
            if split:
                saved, weights = optimizer.state_dict(), model.state_dict()
                model = llama()
                optimizer = lingrad.wrap(model, "svd(rank=4, every=5)", lr=1e-2, stagger=True)
                model.load_state_dict(weights)
                optimizer.load_state_dict(saved)
                with pytest.raises(CheckpointError, match="the checkpoint has stagger True, this run has False"):
                    lingrad.wrap(llama(), "svd(rank=4, every=5)", lr=1e-2).load_state_dict(saved)
            train(model, optimizer, batches[3:], schedule=False)
            runs.append(optimizer.weights())
        assert gap(*runs) == 0

    def test_periods(self):
        found = {"svd(rank=4, every=7)": 7, "svd(rank=4, every=0)": 0, "full()": 0}
        found |= {"kron(left=svd(rank=4, every=7), right=random(rank=3, every=9))": 9}
        assert {text: spec.parse(text).period for text in found} == found

    def test_it_is_a_yes_or_no(self):
        with pytest.raises(SpecError, match="stagger must be True or False, not 3"):
            lingrad.wrap(llama(), "svd(rank=4)", "adamw", lr=1e-3, stagger=3)
