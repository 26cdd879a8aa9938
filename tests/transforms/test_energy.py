"""`svd(energy=...)`: as many columns as a share of the gradient takes (AdaRankGrad: Refael et al., arXiv 2410.17881).

The formulas are written out here in float64; runs are compared with runs whose matrices have the rank in use and no more.
"""

import itertools

import pytest
import torch
from torch import nn

import lingrad
from lingrad.config import spec
from lingrad.engine.adaptive import overlap_of
from lingrad.errors import SpecError
from lingrad.gradients.local import DenseGradient, FactoredGradient
from lingrad.maps import KroneckerMap
from lingrad.testing import assert_dual
from lingrad.transforms import When
from lingrad.transforms.linalg import leading_vectors
from tests.support.runs import MODES, assert_equal_bits, each_mode, through_a_file, weights_of
from tests.support.watch import NoWaiting

CPU = torch.device("cpu")
EXACT = 1e-12  # float64, in another order
SHAPE, RANK, EVERY = (9, 7), 5, 3


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(values, shape=SHAPE, seed=0):
    """A matrix with these singular values."""
    u, v = (torch.linalg.qr(draw(size, len(values), seed=seed + i))[0] for i, size in enumerate(shape))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.t()


def fewest(values, energy, most):
    """The smallest r with s_1^2 + ... + s_r^2 >= energy |G|_F^2, at most ``most``; in pure Python."""
    squares = sorted((float(value) ** 2 for value in values), reverse=True)
    sums = itertools.accumulate(squares)
    return min(most, next(r for r, captured in enumerate(sums, 1) if captured >= energy * sum(squares) * (1 - 1e-15)))


def bases_of(text, grad, dtype=torch.float64):
    transform = spec.parse(text)
    state = transform.init(tuple(grad.shape), seed=3, device=CPU, dtype=dtype)
    found = transform.map(transform.refresh(state, DenseGradient(grad), When(0, 0, 3, tuple(grad.shape))))
    return [basis for basis in (found.left, found.right) if basis is not None]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("solver", ["exact", "gram"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("energy", [0.2, 0.6, 0.9, 0.999, 1.0])
def test_the_fewest_columns_that_capture_the_share(energy, side, solver):
    grad = draw(*SHAPE)
    rank = fewest(torch.linalg.svdvals(grad), energy, RANK)
    whole = bases_of(f"svd(rank={RANK}, side={side}, solver={solver})", grad)
    for basis, full in zip(
        bases_of(f"svd(rank={RANK}, side={side}, solver={solver}, energy={energy})", grad), whole, strict=True
    ):
        assert basis.shape == full.shape
        assert torch.equal(basis[:, rank:], torch.zeros_like(basis[:, rank:]))
        signs = (basis[:, :rank] * full[:, :rank]).sum(0)  # 1 or -1: a column that was zero before is signed by a fixed vector
        torch.testing.assert_close(signs.abs(), torch.ones(rank, dtype=torch.float64), rtol=0, atol=EXACT)


@pytest.mark.parametrize("energy", [0.3, 0.8])
def test_of_a_sketch_the_share_is_the_sketchs(energy):
    """Its columns are Gaussian combinations of those of G: the same r columns capture more of it than of G."""
    transform = spec.parse(f"svd(rank=4, side=left, solver=randomized, oversample=1, energy={energy})")
    state = transform.init((30, 20), seed=3, device=CPU, dtype=torch.float64)
    sketch = draw(30, 5)
    learned = transform.learn(state, (sketch,), When(0, 0, 3, (30, 20)))
    assert int(learned.left.any(0).sum()) == fewest(torch.linalg.svdvals(sketch), energy, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_that_the_gradient_leaves_open_are_zero(dtype):
    """Two tokens: rank two. A share of 1 takes both, and neither rounding nor a seed fills the other columns."""
    grad = FactoredGradient(draw(2, 9, dtype=dtype), draw(2, 7, seed=1, dtype=dtype)).dense()
    for basis in bases_of("svd(rank=5, side=both, energy=1.0)", grad, dtype):
        assert basis.any(0).tolist() == [True, True, False, False, False]


def test_the_size_of_the_gradient_does_not_matter():
    """Squares of 1e-30 and of 1e30 are not numbers of float32."""
    grad = draw(*SHAPE, dtype=torch.float32)
    ranks = {int(bases_of("svd(rank=5, energy=0.7)", grad * size, torch.float32)[0].any(0).sum()) for size in (1e-30, 1, 1e30)}
    assert ranks == {fewest(torch.linalg.svdvals(grad), 0.7, 5)}


def test_the_host_does_not_wait():
    grad = DenseGradient(draw(*SHAPE))
    with NoWaiting():
        leading_vectors(grad, 5, 5, energy=0.9, seed=0)


# Spectra of the gradients of the steps that refresh: the rank in use falls, comes back, and falls again.
SPECTRA = ([4, 3, 2, 1, 0.1], [5, 0.3, 0.2, 0.1, 0.1], [3, 2.5, 2, 0.1, 0.1], [3, 2.5, 0.1, 0.1, 0.1])
IN_USE = [4, 1, 3, 2]
ENERGY = 0.98


def gradients():
    """One for each step; the weight does not change them."""
    for i, values in enumerate(SPECTRA):
        yield with_spectrum(values, seed=100 * i)
        yield from (draw(*SHAPE, seed=50 * i + j) for j in range(EVERY - 1))


RULES = f"svd(rank={RANK}, every={EVERY}, side=left, energy={ENERGY})"


def started(mode, rules=RULES, **options):
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(draw(*SHAPE, seed=9))
    return model, MODES[mode](model, rules, lr=1e-2, **options)


def trained(mode, **options):
    """The loss <W, G_t>, whose gradient is G_t; gives the optimizer and the rank in use after each step."""
    (model, optimizer), seen = started(mode, **options), []
    for grad in gradients():
        (model(torch.eye(SHAPE[1], dtype=torch.float64)) * grad.t()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer.ranks()["0.weight"])
    return optimizer, seen


def written_out(carry, signs):
    """GaLore's algorithm with AdamW in which each matrix has the rank that is in use; ``signs`` are those of the columns."""
    weight, basis, mean, square, lr, eps = draw(*SHAPE, seed=9), None, None, None, 1e-2, 1e-8
    dropped = torch.zeros(2, RANK, SHAPE[1], dtype=torch.float64)
    count = 0
    for step, grad in enumerate(gradients()):
        if step % EVERY == 0:
            values = torch.linalg.svdvals(grad)
            rank = fewest(values, ENERGY, RANK)
            new = torch.linalg.svd(grad)[0][:, :rank] * signs(step // EVERY, rank, torch.linalg.svd(grad)[0])
            if basis is None or carry == "reset":
                mean, square, count = (*torch.zeros(2, rank, SHAPE[1], dtype=torch.float64), 0)
            elif carry == "rotate":
                change = new.t() @ basis  # r_new x r_old
                mean, square = change @ mean, change.square() @ square
            else:  # by place: a column that drops out leaves its moments, which fade, and one that returns finds them
                dropped[0, : len(mean)], dropped[1, : len(mean)] = mean, square
                mean, square = dropped[0, :rank].clone(), dropped[1, :rank].clone()
            basis = new
        count += 1
        small = basis.t() @ grad
        mean, square = 0.9 * mean + 0.1 * small, 0.999 * square + 0.001 * small.square()
        dropped *= torch.tensor([0.9, 0.999], dtype=torch.float64)[:, None, None]
        update = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + eps)
        weight = weight - lr * basis @ update
    return weight


@each_mode
@pytest.mark.parametrize("carry", ["keep", "reset", "rotate"])
def test_a_run_is_that_of_the_rank_in_use(carry, mode):
    """With a base that steps each entry by itself. Of ``keep`` also the moments of dropped columns count, once they return."""
    bases = []

    def signs(refresh, rank, vectors):
        return (vectors[:, :rank] * bases[refresh][:, :rank]).sum(0).sign()

    transform = spec.parse(RULES)
    optimizer, seen = trained(mode, carry=carry)
    assert seen == [rank for rank in IN_USE for _ in range(EVERY)]
    state = transform.init(SHAPE, seed=optimizer.subspaces[0].basis.when.seed, device=CPU, dtype=torch.float64)
    for i, grad in enumerate(list(gradients())[::EVERY]):
        when = When(i * EVERY, i, optimizer.subspaces[0].basis.when.seed, SHAPE)
        state = transform.refresh(state, DenseGradient(grad), when)
        bases.append(state.left)
    torch.testing.assert_close(weights_of(optimizer)["0.weight"], written_out(carry, signs), rtol=0, atol=EXACT)


@each_mode
def test_adarankgrad_by_name(mode):
    """The signs of its columns do not matter where moments are rotated: C has them too."""
    optimizer, seen = trained(mode, rules=f"adarankgrad(rank={RANK}, every={EVERY}, side=left, energy={ENERGY})")
    assert seen[::EVERY] == IN_USE
    expected = written_out("rotate", lambda refresh, rank, vectors: torch.ones(rank, dtype=torch.float64))
    torch.testing.assert_close(weights_of(optimizer)["0.weight"], expected, rtol=0, atol=EXACT)


def test_both_modes_and_switching_give_one_run():
    """One column is in use in most of these weights, two in others, of four."""
    for text, options in (
        ("svd(rank=4, every=3, side=both, energy=0.6)", {"carry": "keep"}),
        ("svd(rank=4, every=3, solver=randomized, energy=0.6)", {"carry": "rotate"}),
        ("coded(each=svd(rank=4, every=3, side=left, energy=0.6), bits=4)", {"carry": "reset"}),
        ("svd(rank=4, every=2, side=long, energy=0.6, schedule=overlap())", {"carry": "transport"}),
    ):
        assert_dual(text, tolerance=EXACT, **options)


@each_mode
def test_a_run_resumes_while_columns_are_zero(mode):
    found = []
    for stop in (None, 4):
        model, optimizer = started(mode)
        for step, grad in enumerate(gradients()):
            if step == stop:
                weights, state = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
                model, optimizer = started(mode)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
                assert optimizer.ranks() == {"0.weight": IN_USE[1]}
            (model(torch.eye(7, dtype=torch.float64)) * grad.t()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights_of(optimizer))
    assert_equal_bits(*found)


def test_experts_have_ranks_of_their_own():
    transform = spec.parse("experts(each=svd(rank=3, side=right, energy=0.9), count=2)")
    grad = torch.cat((with_spectrum([1, 1e-3, 1e-3, 1e-3]), with_spectrum([1, 1, 1, 0.01], seed=5)))
    state = transform.init((18, 7), seed=0, device=CPU, dtype=torch.float64)
    state = transform.refresh(state, DenseGradient(grad), When(0, 0, 0, (18, 7)))
    assert state.each.right.any(1).sum(1).tolist() == [1, 3]


class TestZeroColumns:
    """What else reads a basis: it finds what the columns in use alone would give."""

    def maps(self, dtype=torch.float64):
        left, right = (torch.linalg.qr(draw(size, 2, seed=size, dtype=dtype))[0] for size in (9, 7))
        padded = [torch.cat((side, side.new_zeros(len(side), 3)), 1) for side in (left, right)]
        return KroneckerMap(left, right), KroneckerMap(*padded)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_residual_is_of_the_nearest_in_their_span(self, dtype):
        used, padded = self.maps(dtype)
        matrix = draw(9, 7, dtype=dtype)
        expected = matrix - used.left @ used.left.t() @ matrix @ used.right @ used.right.t()
        # the factorisation of a singular Gram matrix is shifted by 8 r eps, which one refinement squares
        torch.testing.assert_close(padded.residual(matrix), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)

    def test_norm_transport_and_fit(self):
        used, padded = self.maps()
        coords = draw(5, 5)
        torch.testing.assert_close(padded.norm(coords), used.norm(coords[:2, :2]), rtol=EXACT, atol=0)
        for moved in (padded.transport(padded, coords), padded.transport_squares(padded, coords)):
            torch.testing.assert_close(moved[:2, :2], coords[:2, :2], rtol=0, atol=EXACT)
            assert not moved[2:].any()
            assert not moved[:, 2:].any()
        matrix = draw(9, 7)
        torch.testing.assert_close(padded.lift(padded.fit(matrix)), used.lift(used.project(matrix)), rtol=0, atol=EXACT)

    def test_two_bases_of_one_span_overlap_in_full(self):
        _, padded = self.maps()
        assert float(overlap_of(padded, padded, (5, 5), padded.left)) == pytest.approx(1.0, rel=EXACT)

    def test_what_was_merged_is_the_change_of_the_weight(self):
        optimizer, _ = trained("adapter", ledger=True)
        change = optimizer.changes()["0.weight"]
        expected = weights_of(optimizer)["0.weight"] - draw(*SHAPE, seed=9)
        torch.testing.assert_close(change.factors.dense(), expected, rtol=0, atol=EXACT)


def test_memory_is_that_of_the_rank():
    for text in ("svd(rank=5, side=both{})", "coded(each=svd(rank=5{}), bits=4)"):
        with_energy, without = (spec.parse(text.format(more)) for more in (", energy=0.5", ""))
        assert with_energy.storage(SHAPE, torch.bfloat16) == without.storage(SHAPE, torch.bfloat16)
        assert with_energy.coords_shape(SHAPE) == without.coords_shape(SHAPE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("svd(rank=3, side=both)", 3), ("rows(rank=3)", 3), ("full()", None), ("random(rank=2, kind=rows, side=left)", 2)],
)
def test_the_rank_in_use_of_other_transforms(text, expected):
    optimizer = lingrad.wrap(nn.Sequential(nn.Linear(7, 9, bias=False)), text, lr=1e-2)
    assert optimizer.ranks() == ({} if expected is None else {"0.weight": expected})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("svd(rank=3, energy=0)", "energy is the share of .* above 0 and at most 1, not 0.0"),
        ("svd(rank=3, energy=1.01)", "above 0 and at most 1, not 1.01"),
        ("svd(rank=3, energy=high)", "energy must be a number or none, not high"),
        ("svd(rank=3, energy=0.5, choice=sigma)", "energy counts leading singular vectors, and choice=sigma draws a sample"),
    ],
)
def test_what_it_refuses(text, message):
    with pytest.raises(SpecError, match=message):
        spec.parse(text)
