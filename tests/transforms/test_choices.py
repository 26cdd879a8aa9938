"""Bases that are sampled, selected, computed from indices, read off the weight or switched, against the papers' formulas.

The formulas are written out here in float64 and share no code with the package.
"""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

import lingrad
from lingrad.config import spec
from lingrad.errors import SpecError
from lingrad.gradients.averaged import AveragedGradient
from lingrad.gradients.local import DenseGradient, FactoredGradient, RowsGradient
from lingrad.gradients.stacked import StackedGradient
from lingrad.maps import SelectionMap
from lingrad.parallel import Processes
from lingrad.transforms import When
from lingrad.transforms.linalg import choose_by_size
from tests.support.cases import SIDES

pytestmark = [pytest.mark.thinned(3), pytest.mark.rare(3)]

CPU = torch.device("cpu")
SHAPES = [(12, 7), (7, 12), (9, 9)]
EXACT = 1e-12  # float64, in another order
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_side = pytest.mark.parametrize("side", SIDES)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state_of(transform, shape, grads, dtype=torch.float64, seed=3):
    """The state after a refresh from each gradient."""
    state = transform.init(shape, seed=seed, device=CPU, dtype=dtype)
    for i, grad in enumerate(grads):
        given = grad if not isinstance(grad, torch.Tensor) else DenseGradient(grad)
        state = transform.refresh(state, given, When(i * 7, i, seed, shape))
    return state


def bases_of(text, shape, *grads, **options):
    """The left and the right basis [size, r] of a transform, of one whose map selects as columns of the identity."""
    transform = spec.parse(text)
    found = transform.map(state_of(transform, shape, grads, **options))
    if isinstance(found, SelectionMap):
        return tuple(
            None if chosen is None else torch.eye(size, dtype=torch.float64)[:, chosen]
            for chosen, size in ((found.rows, found.shape[0]), (found.columns, found.shape[1]))
        )
    return found.left, found.right


def sides_of(side, shape):
    """Which sides have a basis: GaLore's convention."""
    short, long = ("right", "left") if shape[0] >= shape[1] else ("left", "right")
    return {"short": (short,), "long": (long,), "both": ("left", "right")}.get(side, (side,))


def largest(sizes, count):
    """The indices of the largest, by pure Python."""
    return sorted(sorted(range(len(sizes)), key=lambda i: -float(sizes[i]))[:count])


class TestRows:
    """Grass: Muhamed et al., arXiv 2406.17660: P selects the rows of the largest norms in the gradient."""

    @each_side
    @each_shape
    def test_top_rows(self, shape, side):
        grad = draw(*shape)
        left, right = bases_of(f"rows(rank=4, side={side})", shape, grad)
        assert (left is not None, right is not None) == tuple(s in sides_of(side, shape) for s in ("left", "right"))
        for basis, turned in ((left, grad), (right, grad.t())):
            if basis is not None:
                chosen = largest([sum(float(x) ** 2 for x in row) for row in turned], 4)
                assert torch.equal(basis, torch.eye(len(turned), dtype=torch.float64)[:, chosen])

    def test_a_selected_row_keeps_its_moments_and_others_lose_them(self):
        """carry=rotate and transport: S_new^T S_old is a selection of the rows that both bases have."""
        old, new = (SelectionMap(torch.tensor(rows), None, (6, 3)) for rows in ([0, 2, 5], [1, 2, 5]))
        moments = draw(3, 3).abs()
        expected = torch.stack([torch.zeros(3, dtype=torch.float64), moments[1], moments[2]])
        assert torch.equal(new.transport(old, moments), expected)
        assert torch.equal(new.transport_squares(old, moments), expected)

    @pytest.mark.parametrize(("choice", "power"), [("norm", 1), ("square", 2)])
    def test_samples_follow_the_norms(self, choice, power):
        """Successive draws without replacement: the probability of a pair is q_i q_j / (1 - q_i) plus the other order's."""
        norms = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        grad = torch.diag(norms)
        weights = [float(norm) ** power for norm in norms]
        q = [weight / sum(weights) for weight in weights]
        expected = {
            pair: sum(q[i] * q[j] / (1 - q[i]) for i, j in (pair, pair[::-1])) for pair in itertools.combinations(range(4), 2)
        }
        transform, count = spec.parse(f"rows(rank=2, side=left, choice={choice})"), 4000
        start = transform.init((4, 4), seed=0, device=CPU, dtype=torch.float64)
        found = dict.fromkeys(expected, 0)
        for seed in range(count):
            state = transform.refresh(start, DenseGradient(grad), When(0, 0, seed, (4, 4)))
            found[tuple(state.left.tolist())] += 1
        for pair, probability in expected.items():
            deviation = math.sqrt(probability * (1 - probability) / count)
            assert abs(found[pair] / count - probability) <= 4 * deviation

    def test_one_nonzero_row(self):
        grad = torch.zeros(8, 5, dtype=torch.float64)
        grad[6] = draw(5)
        for choice in ("top", "norm", "square"):
            state = state_of(spec.parse(f"rows(rank=3, side=left, choice={choice})"), (8, 5), [grad])
            assert state.left.tolist() == [0, 1, 6]  # those of no gradient in order

    def test_indices_are_all_that_is_stored(self):
        transform = spec.parse("rows(rank=3, side=both)")
        state = state_of(transform, (8, 5), [draw(8, 5)], dtype=torch.bfloat16)
        assert [(t.dtype, t.numel()) for t in state if isinstance(t, torch.Tensor)] == [
            (torch.int64, 3),
            (torch.int64, 3),
            (torch.bfloat16, 0),
        ]
        assert [(t.dtype, t.shape) for t in transform.storage((8, 5), torch.bfloat16)] == [(torch.int64, (3,))] * 2


class TestRowNorms:
    """The norms of a gradient's rows, in every form that it may have."""

    def forms(self):
        out_grad, inputs = draw(6, 700), draw(6, 9, seed=1)
        grad = out_grad.t() @ inputs
        factored = FactoredGradient(out_grad, inputs)
        yield grad, DenseGradient(grad)
        yield grad, factored
        yield grad.t(), factored.T
        yield torch.cat((grad, grad)), StackedGradient([factored, DenseGradient(grad)])
        yield torch.cat((grad, grad)).t(), StackedGradient([factored, DenseGradient(grad)]).T
        padded = torch.zeros(800, 9, dtype=torch.float64)
        padded[50:750] = grad
        yield padded, RowsGradient(factored, 50, 800)
        yield padded.t(), RowsGradient(factored, 50, 800).T
        yield grad, AveragedGradient(factored, Processes(alone=True))

    def test_are_those_of_the_matrix(self):
        for matrix, grad in self.forms():
            torch.testing.assert_close(grad.row_norms(), matrix.square().sum(1).sqrt(), rtol=EXACT, atol=EXACT)

    def test_the_matrix_is_not_formed(self, monkeypatch):
        out_grad, inputs = draw(6, 700), draw(6, 900, seed=1)
        shapes = []
        original = FactoredGradient.dense
        monkeypatch.setattr(FactoredGradient, "dense", lambda grad: shapes.append(grad.shape) or original(grad))
        spec_ = spec.parse("rows(rank=3, side=both)")
        state_of(spec_, (700, 900), [FactoredGradient(out_grad, inputs)])
        assert max(rows * columns for rows, columns in shapes) <= 512 * 900


class TestCosines:
    """DCT-AdamW: Modoranu et al., arXiv 2505.17967: the columns of an orthonormal cosine matrix that fit the gradient best."""

    def matrix(self, size):
        """Entry by entry, by Python's own cosine."""
        entries = [
            [math.sqrt((1 if j == 0 else 2) / size) * math.cos(math.pi * (2 * i + 1) * j / (2 * size)) for j in range(size)]
            for i in range(size)
        ]
        return torch.tensor(entries, dtype=torch.float64)

    @each_side
    @each_shape
    @pytest.mark.parametrize("store", ["true", "false"])
    def test_the_columns_of_the_largest_products(self, shape, side, store):
        grad = draw(*shape)
        bases = bases_of(f"dct(rank=4, side={side}, store={store})", shape, grad)
        for basis, turned, name in zip(bases, (grad, grad.t()), ("left", "right"), strict=True):
            assert (basis is not None) == (name in sides_of(side, shape))
            if basis is not None:
                columns = self.matrix(len(turned))
                chosen = largest((turned.t() @ columns).square().sum(0), 4)
                torch.testing.assert_close(basis, columns[:, chosen], rtol=0, atol=EXACT)

    def test_is_orthonormal_at_any_size(self):
        for size in (1, 2, 600):
            transform = spec.parse(f"dct(rank={size}, side=left)")
            basis = transform.map(transform.init((size, size), seed=0, device=CPU, dtype=torch.float64)).left
            torch.testing.assert_close(basis.t() @ basis, torch.eye(size, dtype=torch.float64), rtol=0, atol=EXACT)

    def test_is_rounded_once_from_float64(self):
        columns = self.matrix(600)
        for dtype in (torch.float32, torch.bfloat16):
            transform = spec.parse("dct(rank=600, side=left)")
            basis = transform.map(transform.init((600, 600), seed=0, device=CPU, dtype=dtype)).left
            nearest = columns.to(dtype).double()
            assert (basis.double() - nearest).abs().max() <= torch.finfo(dtype).eps * 0.1

    def test_equal_products_are_not_decided_by_rounding(self):
        """A gradient of one row has products of equal size with many columns."""
        grad = torch.zeros(16, 5, dtype=torch.float64)
        grad[0] = draw(5)
        out_grad, inputs = torch.zeros(4, 16, dtype=torch.float64), draw(4, 5, seed=2)
        out_grad[:, 0] = 1.0
        inputs[-1] += grad[0] - inputs.sum(0)
        nudged = grad * (1 + 3e-16 * draw(16, 5, seed=3).sign())
        transform = spec.parse("dct(rank=5, side=left)")
        forms = (DenseGradient(grad), FactoredGradient(out_grad, inputs), DenseGradient(nudged))
        states = [state_of(transform, (16, 5), [form]) for form in forms]
        assert all(torch.equal(state.left, states[0].left) for state in states)


class TestSampledVectors:
    """SARA: Zhang et al., arXiv 2502.05790: singular vectors sampled without replacement, w_i = sigma_i / sum of sigma."""

    @each_side
    @each_shape
    @pytest.mark.parametrize("choice", ["sigma", "sqrt_sigma"])
    @pytest.mark.parametrize("solver", ["exact", "gram"])
    def test_columns_are_singular_vectors(self, shape, side, choice, solver):
        grad = draw(*shape)
        u, s, vh = torch.linalg.svd(grad)
        chosen = []
        for basis, vectors in zip(
            bases_of(f"svd(rank=4, side={side}, choice={choice}, solver={solver})", shape, grad), (u, vh.t()), strict=True
        ):
            if basis is None:
                continue
            overlap = (vectors[:, : len(s)].t() @ basis).abs()
            assert torch.allclose(overlap.max(0).values, torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0)
            chosen.append(overlap.argmax(0).tolist())
            assert chosen[-1] == sorted(set(chosen[-1]))  # each once, in the order of the singular values
        assert all(found == chosen[0] for found in chosen)  # the same on both sides

    @pytest.mark.parametrize(("choice", "power"), [("sigma", 1), ("sqrt_sigma", 0.5)])
    def test_probabilities(self, choice, power):
        values = [1.0, 2.0, 4.0]
        weights = [value**power for value in values]
        transform, count = spec.parse(f"svd(rank=1, side=left, choice={choice})"), 3000
        start = transform.init((3, 3), seed=0, device=CPU, dtype=torch.float64)
        found = [0, 0, 0]
        grad = DenseGradient(torch.diag(torch.tensor(values, dtype=torch.float64)))
        for seed in range(count):
            basis = transform.refresh(start, grad, When(0, 0, seed, (3, 3))).left
            found[int(basis.abs().argmax())] += 1
        for hits, weight in zip(found, weights, strict=True):
            q = weight / sum(weights)
            assert abs(hits / count - q) <= 4 * math.sqrt(q * (1 - q) / count)

    def test_rank_of_min_takes_all_and_low_rank_is_completed(self):
        left, _ = bases_of("svd(rank=5, side=left, choice=sigma)", (8, 5), draw(8, 5))
        u, _, _ = torch.linalg.svd(draw(8, 5), full_matrices=False)
        torch.testing.assert_close((u.t() @ left).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-9)
        low = draw(8, 2) @ draw(2, 5, seed=1)
        left, _ = bases_of("svd(rank=4, side=left, choice=sigma)", (8, 5), low)
        torch.testing.assert_close(left.t() @ left, torch.eye(4, dtype=torch.float64), rtol=0, atol=EXACT)
        torch.testing.assert_close(left @ (left.t() @ low), low, rtol=0, atol=EXACT)  # those that it has were all taken
        again, _ = bases_of("svd(rank=4, side=left, choice=sigma)", (8, 5), low * (1 + 1e-16))
        torch.testing.assert_close(again, left, rtol=0, atol=1e-10)

    def test_a_vector_that_returns_has_its_sign(self):
        grad = draw(9, 7)
        first, second = (
            bases_of("svd(rank=7, side=left, choice=sigma)", (9, 7), *seen)[0] for seen in ([grad], [grad, -grad, grad])
        )
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


class TestSwitch:
    """GoLore: He et al., arXiv 2410.11289: SVD early, a random orthonormal matrix late."""

    @each_side
    @each_shape
    def test_early_and_late(self, shape, side):
        grads = [draw(*shape, seed=i) for i in range(3)]  # in steps 0, 7 and 14
        text = f"switch(rank=3, side={side}, after=8)"
        for count, plain in ((1, True), (2, True), (3, False)):
            found = bases_of(text, shape, *grads[:count])
            early = bases_of(f"svd(rank=3, side={side})", shape, *grads[:count])
            for a, b in zip(found, early, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert torch.equal(a, b) == plain
                    torch.testing.assert_close(a.t() @ a, torch.eye(3, dtype=torch.float64), rtol=0, atol=EXACT)

    def test_a_late_basis_knows_nothing_of_the_gradient(self):
        shape = (9, 7)
        found = [bases_of("switch(rank=3, side=both, after=0)", shape, draw(*shape, seed=seed)) for seed in (0, 1)]
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        other = bases_of("switch(rank=3, side=both, after=0)", shape, draw(*shape), seed=4)
        assert not torch.equal(other[0], found[0][0])

    def test_after_must_be_given(self):
        with pytest.raises(SpecError, match="switch needs after"):
            spec.parse("switch(rank=3)")
        with pytest.raises(SpecError, match="after must be 0"):
            spec.parse("switch(rank=3, after=-1)")


class TestAnyOfThem:
    """What goes for all of them in a run."""

    TEXTS = (
        "svd(rank=2, every=2, choice=sigma)",
        "rows(rank=2, every=2)",
        "rows(rank=2, every=2, choice=norm)",
        "dct(rank=2, every=2)",
        "switch(rank=2, every=2, after=3)",
    )

    @staticmethod
    def run(text, make=lingrad.wrap, steps=5, dtype=torch.float32, spoil=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, 3, dtype=dtype))
        optimizer = make(model, {"0": text, "2": text}, lr=1e-2)
        for step in range(steps):
            loss = model(draw(8, 6, seed=step, dtype=torch.float32).to(dtype)).square().mean()
            (loss * (spoil if step == 2 and spoil is not None else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("make", [lingrad.wrap, lingrad.adapt])
    def test_gradient_that_is_not_finite_leaves_the_basis(self, text, make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, optimizer = self.run(text, make, steps=3, spoil=float("nan"))
        assert any("the gradient's norm at a refresh is not finite" in str(one.message) for one in caught)
        for sub in optimizer.subspaces:
            assert sub.basis.refreshes == 1
            assert all(t.isfinite().all() for t in sub.map().tensors)

    @pytest.mark.parametrize("text", TEXTS)
    def test_zero_gradient_and_bfloat16(self, text):
        before, _ = self.run(text, steps=2, dtype=torch.bfloat16)
        after, _ = self.run(text, steps=3, dtype=torch.bfloat16, spoil=0.0)
        assert all(p.isfinite().all() for p in (*before.parameters(), *after.parameters()))

    @pytest.mark.parametrize("text", TEXTS)
    def test_clip_and_full_rank(self, text):
        self.run(text.replace("rank=2", "rank=3"))
        model, _ = self.run(text.replace("rank=2", "rank=50, clip=true"))
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("text", TEXTS)
    def test_the_same_on_every_run(self, text):
        a, b = (self.run(text)[0].state_dict() for _ in range(2))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_choose_by_size_takes_what_is_rounding_last():
    sizes = torch.tensor([0.0, 1e-17, 3.0, 1e-18, 2.0], dtype=torch.float64)
    floor = torch.tensor(1e-15, dtype=torch.float64)
    for power in (None, 1.0):
        assert choose_by_size(sizes, 3, floor=floor, power=power, seed=5).tolist() == [0, 2, 4]
        assert choose_by_size(sizes * 0, 2, floor=floor * 0, power=power, seed=5).tolist() == [0, 1]
