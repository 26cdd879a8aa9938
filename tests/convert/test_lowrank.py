"""The rank of a change, found without forming it: against a dense SVD in float64, over ranks, dtypes, roundings, decay."""

import pytest
import torch

from lingrad.convert.difference import Difference
from lingrad.convert.lowrank import Goal, detect
from lingrad.errors import DataError, SpecError

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def weights(m, n, rank, dtype=FP32, *, size=1e-2, kept=1.0, steps=1, seed=0):
    """START of standard deviation 0.05, and TUNED: a share of it and a matrix of a rank, in steps that are each rounded."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = (0.05 * draw(m, n)).to(dtype)
    tuned = base.clone()
    for _ in range(steps):
        change = 0.05 * size * draw(m, rank // steps) @ draw(rank // steps, n) / rank**0.5
        tuned = (tuned.double() * kept ** (1 / steps) + change).to(dtype)
    return tuned, base


def difference(tuned, base, blocks=None):
    return Difference(tuple(tuned.shape), tuned.dtype, lambda i, j: (tuned[i:j], base[i:j]))


def dense(tuned, base, kept=1.0):
    return tuned.double() - kept * base.double()


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128), (16, 300), (7, 7)])
@pytest.mark.parametrize(("dtype", "size"), [(FP32, 1e-2), (FP64, 1e-2), (BF16, 1.0), (torch.float16, 1.0)])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_exact_rank(shape, dtype, size, share):
    """The rank that went in comes out, and the residual that is told is that of the dense matrix, to rounding of float64. What
    is left is no more than what rounding TUNED once did: half an ulp at most, uniform, 1.2 allowing for chance."""
    rank = max(1, int(share * min(shape)))
    tuned, base = weights(*shape, rank, dtype, size=size)
    found = detect(difference(tuned, base), Goal(), seed=1)
    assert found.factors.rank == rank
    assert found.decay == 1.0
    change = dense(tuned, base)
    left = (change - found.factors.dense()).norm() / change.norm()
    assert found.residual == pytest.approx(float(left), rel=1e-6, abs=1e-14)
    assert found.norm == pytest.approx(float(change.norm()), rel=1e-12)
    assert found.residual <= 1.2 * found.floor


def test_the_floor_is_the_rounding_of_the_dtype():
    """nu^2 = sum of ulp^2 / 12, against the rounding that did happen: equal to 3 % over 15,360 entries."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(96, 160, generator=generator, dtype=FP64)
    for dtype in (FP32, BF16, torch.float16):
        rounded = exact.to(dtype)
        found = detect(difference(rounded, torch.zeros_like(rounded)), Goal(), seed=0)
        happened = (rounded.double() - exact).norm() / rounded.double().norm()
        assert found.floor == pytest.approx(float(happened), rel=0.03)


def test_the_floor_of_what_is_tiny_or_zero():
    """Below the smallest normal number units shrink no more, and zeros, of a pruned weight, are not rounded as ones are."""
    generator = torch.Generator().manual_seed(0)
    exact = 1e-6 * torch.randn(96, 160, generator=generator, dtype=FP64)
    rounded = exact.half()
    found = detect(difference(rounded, torch.zeros_like(rounded)), Goal(), seed=0)
    assert found.floor == pytest.approx(float((rounded.double() - exact).norm() / rounded.double().norm()), rel=0.03)
    for dtype, size in ((FP32, 1e-2), (torch.float16, 1.0)):
        tuned, base = weights(96, 160, 5, dtype, size=size)
        rows = detect(difference(tuned[:24], base[:24]), Goal(), seed=1)
        tuned[24:], base[24:] = 0, 0
        found = detect(difference(tuned, base), Goal(), seed=1)
        assert found.factors.rank == rows.factors.rank == 5
        assert found.floor == pytest.approx(rows.floor, rel=1e-4)  # three rows of zeros for one, each (2^-9)^2 of it or less


@pytest.mark.parametrize("steps", [4, 20])
def test_many_roundings_are_told_from_what_was_learned(steps):
    """A training rounds at every step, and more than one rounding is left; it looks like noise, and no rank is spent on it."""
    tuned, base = weights(96, 160, 20, steps=steps)
    found = detect(difference(tuned, base), Goal(), seed=1)
    assert found.factors.rank == 20
    assert found.floor < found.residual < 1.5 * steps**0.5 * found.floor


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99, 0.9999, 1.02])
@pytest.mark.parametrize(("rank", "steps"), [(1, 1), (12, 1), (20, 10), (50, 5)])
def test_decay_is_told_apart(kept, rank, steps):
    """kept is found to what rounding allows: an error e of it leaves e |START|, which must be within the rounding left."""
    tuned, base = weights(96, 160, rank, kept=kept, steps=steps)
    found = detect(difference(tuned, base), Goal(), seed=1)
    assert found.factors.rank == rank
    rounding = float(dense(tuned, base).norm()) * found.floor * 2 * steps**0.5
    assert abs(found.decay - kept) * float(base.double().norm()) <= rounding
    change = dense(tuned, base, found.decay) - found.factors.dense()
    assert found.residual == pytest.approx(float(change.norm() / dense(tuned, base).norm()), rel=1e-6)
    assert float(change.norm()) <= rounding


def test_decay_in_bfloat16():
    tuned, base = weights(96, 160, 12, BF16, size=1.0, kept=0.9)
    found = detect(difference(tuned, base), Goal(), seed=1)
    assert found.factors.rank == 12
    assert found.decay == pytest.approx(0.9, abs=1e-3)


def test_a_change_along_the_base_is_no_decay():
    """A change whose low rank is that of the base itself correlates with it, and all of it is kept."""
    _, base = weights(96, 160, 1)
    u, s, vh = torch.linalg.svd(base.double(), full_matrices=False)
    tuned = (base.double() + 0.05 * (u[:, :30] * s[:30]) @ vh[:30]).float()
    found = detect(difference(tuned, base), Goal(), seed=1)
    assert (found.factors.rank, found.decay) == (30, 1.0)
    assert found.residual <= 1.2 * found.floor


@pytest.mark.parametrize("kept", [1.0, 0.95])
def test_full_rank(kept):
    tuned, base = weights(60, 80, 60, size=1.0, kept=kept)
    found = detect(difference(tuned, base), Goal(), seed=1)
    assert (found.factors.rank, found.decay) == (60, 1.0)
    assert found.residual <= 1e-12


def test_a_smooth_spectrum_is_not_noise():
    """Singular values that fall by 2 % each: nothing in them is flat, and what may be dropped is what rounding did."""
    u, v = (torch.linalg.qr(torch.randn(120, 120, generator=torch.Generator().manual_seed(s), dtype=FP64))[0] for s in (0, 1))
    _, base = weights(120, 120, 1)
    tuned = (base.double() + 0.1 * (u * 0.98 ** torch.arange(120)) @ v.T).float()
    found = detect(difference(tuned, base), Goal(), seed=1)
    assert found.factors.rank > 100
    assert found.residual <= 1e-5


class TestGoals:
    TUNED, START = weights(96, 160, 40)

    def best(self):
        return torch.linalg.svdvals(dense(self.TUNED, self.START))

    @pytest.mark.parametrize("full_svd", [False, True])
    def test_rank(self, full_svd):
        """The residual of the best rank-10 approximation (Eckart and Young), to 5 % by random projections."""
        found = detect(difference(self.TUNED, self.START), Goal(rank=10), seed=1, full_svd=full_svd)
        best = float(self.best()[10:].norm() / self.best().norm())
        assert found.factors.rank == 10
        assert best * (1 - 1e-9) <= found.residual <= best * (1 + (1e-9 if full_svd else 0.05))

    def test_rank_is_not_more_than_needed(self):
        assert detect(difference(self.TUNED, self.START), Goal(rank=60), seed=1).factors.rank == 40

    @pytest.mark.parametrize("full_svd", [False, True])
    @pytest.mark.parametrize("lost", [0.3, 0.1, 1e-4])
    def test_energy_and_error_are_one_goal(self, lost, full_svd):
        """The goal is met, with at most two columns more than the least that can."""
        squares = self.best().square()
        least = int((squares.flip(0).cumsum(0).flip(0) > lost * squares.sum()).sum())
        for goal in (Goal(energy=1 - lost), Goal(max_error=lost**0.5)):
            found = detect(difference(self.TUNED, self.START), goal, seed=1, full_svd=full_svd)
            assert found.residual**2 <= lost * (1 + 1e-9)
            assert least <= found.factors.rank <= least + (0 if full_svd else 2)

    def test_a_goal_is_about_the_whole_difference(self):
        """Decay is part of it, and told where it shows in what is left."""
        tuned, base = weights(96, 160, 5, kept=0.9)
        found = detect(difference(tuned, base), Goal(max_error=0.1), seed=1)
        left = (dense(tuned, base) - found.factors.dense()).norm() / dense(tuned, base).norm()
        assert left <= 0.1
        assert detect(difference(tuned, base), Goal(rank=5), seed=1).decay == pytest.approx(0.9, abs=0.02)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, "rank must be a whole number, at least 1, not 0"),
            ({"energy": 1.5}, "energy must lie between 0 and 1, not 1.5"),
            ({"max_error": 0.0}, "max_error must lie between 0 and 1, not 0.0"),
            ({"rank": 2, "energy": 0.5}, "rank and energy are different goals; give one of them"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(SpecError, match=message):
            Goal(**options)


def test_nothing_changed():
    _, base = weights(20, 30, 4)
    assert detect(difference(base, base), Goal(), seed=1) is None


@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_are_none(which):
    pair = weights(20, 30, 4)
    pair[which][3, 4] = float("nan")
    pair[which][5, 4] = float("inf")
    with pytest.raises(DataError, match=f"the weight of {('TUNED', 'START')[which]} has 2 elements that are NaN or infinite"):
        detect(difference(*pair), Goal(), seed=1)


def test_blocks_of_rows_change_nothing(monkeypatch):
    """A matrix read in 24 blocks, nothing of it kept, gives what one read at once gives, but for the order of sums."""
    from lingrad.convert import difference as module

    tuned, base = weights(96, 160, 12, kept=0.99)
    whole = detect(difference(tuned, base), Goal(), seed=1)
    monkeypatch.setattr(module, "_BLOCK", 4 * 160)
    monkeypatch.setattr(module, "_ROWS", 1)
    asked = []

    def rows(start, stop):
        asked.append(stop - start)
        return tuned[start:stop], base[start:stop]

    blocked = detect(Difference((96, 160), FP32, rows), Goal(), seed=1)
    assert set(asked) == {4}
    assert blocked.factors.rank == whole.factors.rank
    assert blocked.decay == pytest.approx(whole.decay, rel=1e-12)
    assert (blocked.factors.dense() - whole.factors.dense()).norm() <= 1e-9 * whole.factors.dense().norm()
