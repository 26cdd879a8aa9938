"""The low-rank factors of a change D = TUNED - decay * START, with a residual that is computed, not estimated.

A randomized range finder (Halko, Martinsson, Tropp, SIAM Review 53, 2011, algorithms 4.1 to 4.4) grows an orthonormal Q in
blocks, each as wide as all before, with one power iteration; after each block |D - Q Q^T D|_F is summed entry by entry in
float64. D is never stored: every pass reads rows of both weights again, so only Q, Q^T D and a few rows are in memory.

Without a goal the rank is the smallest one down to the *rounding floor*. Storing TUNED in its dtype adds noise of norm nu,
nu^2 = sum of ulp(entry)^2 / 12, and training rounds at every step, about sqrt(steps) nu in all. What a rank leaves counts as
rounding if its norm is at most 1.2 nu; or if it is at most 256 nu and looks like noise, `looks_like_noise`.

Decoupled decay multiplies weights by decay < 1, which makes D full rank: (decay - 1) START + what was learned. It is recognised
by what a Q leaves: where that correlates with START, decay is moved to the least-squares fit outside the ranges found, Q is
iterated on the new D, and so on while the remainder shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lingrad.convert.difference import Difference, ResidualSums
from lingrad.errors import require
from lingrad.maps.factors import Factors

FIRST = 16  # columns of the first block
ONE_ROUNDING = 1.2  # as a norm, allowing for chance and for a program that rounds twice
MOST_ROUNDINGS = 256.0  # as a norm: of 65,536 independent roundings of every entry
LARGE = 0.01  # the share of |D|_F above which more directions must be known before it counts as noise
FLAT, SPREAD, DEEP = 1.25, 0.6, 0.1  # allowing for chance, and for entries whose roundings are not of one size
ALONG = 0.25  # the correlation of a remainder with START from which decay is looked for


@dataclass(frozen=True)
class Goal:
    """How much of a change to find: one of the three, or none for all of it, down to the rounding floor.

    Args:
        rank: This many columns, or fewer where fewer hold all of the change.
        energy: The least share of |D|_F^2.
        max_error: The largest |D - left @ right|_F / |D|_F.

    Raises:
        SpecError: More than one is given, or one is out of range.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        """Check the three."""
        given = [name for name in ("rank", "energy", "max_error") if getattr(self, name) is not None]
        require(len(given) < 2, given[-1] if given else "", f"{' and '.join(given)} are different goals; give one of them")
        fits = self.rank is None or (type(self.rank) is int and self.rank >= 1)
        require(fits, "rank", f"rank must be a whole number, at least 1, not {self.rank!r}")
        for name in ("energy", "max_error"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, name, f"{name} must lie between 0 and 1, not {value}")
        least = self.max_error is None or self.max_error >= 1e-15
        require(least, "max_error", f"max_error must be at least 1e-15, the resolution of float64, not {self.max_error}")

    @property
    def exact(self) -> bool:
        """Whether all of the change is to be found."""
        return self == Goal()

    @property
    def words(self) -> str:
        """The goal as a phrase for people."""
        for name in ("rank", "energy", "max_error"):
            if getattr(self, name) is not None:
                return f"{name.replace('_', ' ')} {getattr(self, name):g}"
        return "all of the change, down to rounding"

    @property
    def lost(self) -> float:
        """The share of |D|_F^2 that may be lost, where that is the goal."""
        if self.energy is not None:
            return 1.0 - self.energy
        return 0.0 if self.max_error is None else self.max_error**2


@dataclass(frozen=True)
class Found:
    """A change as factors, with what they leave.

    Args:
        factors: left [m, r] and right [r, n], float64, singular values divided evenly.
        decay: The factor by which decoupled decay has multiplied START; 1 without decay.
        norm: |TUNED - START|_F.
        residual: |D - left @ right|_F / |TUNED - START|_F; D is TUNED - decay * START if the goal was all of it, else
            TUNED - START.
        floor: What rounding TUNED to its dtype once leaves, nu / |TUNED - START|_F.
    """

    factors: Factors
    decay: float
    norm: float
    residual: float
    floor: float


def detect(change: Difference, goal: Goal, seed: int, *, full_svd: bool = False) -> Found | None:
    """Find the factors of a change.

    Args:
        change: The change; its ``decay`` is set where decay is recognised.
        goal: How much to find. Decay is looked for if that is all; any other goal is about TUNED - START itself.
        seed: Of the random blocks.
        full_svd: Take the singular value decomposition of D, formed in float64, instead of a range finder.

    Returns:
        What was found; None where TUNED equals START.
    """
    m, n = change.shape
    q, r = torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64)
    start = change.sums()
    if start.energy == 0.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    while True:
        width = min(m, n) if full_svd else _wider(q.shape[1], min(m, n))
        block = _left_vectors(change) if full_svd else _more(change, q, width - q.shape[1], generator)
        q, r = torch.cat([q, block], 1), torch.cat([r, change.transposed(block).t()])
        remaining = change.residual(q, r)
        if goal.exact and width < min(m, n):
            q, r, remaining = _settle(change, q, r, remaining)
            if change.decay != 1.0 and abs(change.decay - 1.0) * remaining.start**0.5 <= start.rounding**0.5 / 4:
                change.decay = 1.0  # the difference from 1 is within noise
                r = change.transposed(q).t()
                remaining = change.residual(q, r)
        values = torch.linalg.svdvals(torch.linalg.qr(r.t())[1])
        rank = _enough(goal, values, remaining.energy, start, change.shape)
        if rank is not None or width == min(m, n):
            break
    if width == min(m, n) and change.decay != 1.0:  # not of low rank with any decay
        change.decay = 1.0
        r = change.transposed(q).t()
        rank = _enough(goal, torch.linalg.svdvals(torch.linalg.qr(r.t())[1]), 0.0, start, change.shape)
    factors = _divided(q, r, width if rank is None else rank)
    left = change.residual(factors.left, factors.right)
    decay = change.decay if goal.exact else _decay_of(change, factors, left)
    norm = start.energy**0.5
    return Found(factors, decay, norm, (left.energy / start.energy) ** 0.5, start.rounding**0.5 / norm)


def _wider(width: int, most: int) -> int:
    """The next width of a basis: twice the last; beyond half of all directions, half of those that remain."""
    if most - width <= max(4, most // 16):
        return most
    return min(max(FIRST, 2 * width), max(most // 2, (width + most) // 2), most)


def _enough(goal: Goal, values: Tensor, outside: float, start: ResidualSums, shape: tuple[int, int]) -> int | None:
    """The smallest rank that reaches a goal, at least 1; None where the basis is too small to decide.

    Args:
        goal: The goal.
        values: Singular values inside the basis, [p].
        outside: |D - Q Q^T D|_F^2.
        start: The sums before anything was found.
        shape: (m, n).

    Returns:
        The rank.
    """
    p = len(values)
    squares = values.square()
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + outside  # of ranks 0 to p
    enough = tails <= ONE_ROUNDING**2 * start.rounding
    for k in (tails[:-1] <= MOST_ROUNDINGS**2 * start.rounding).nonzero().flatten().tolist():
        if enough[k] or looks_like_noise(k, values, tails, shape):
            enough[k] = True
            break
    needed = int(enough.nonzero()[0]) if bool(enough.any()) else None
    if goal.lost:
        reached = (tails <= goal.lost * start.energy).nonzero()
        return max(1, int(reached[0])) if len(reached) else None
    if goal.rank is not None and needed is None and p >= min(*shape, goal.rank + FIRST):
        needed = p
    if needed is None:
        return None
    return max(1, needed if goal.rank is None else min(goal.rank, needed))


def looks_like_noise(rank: int, values: Tensor, tails: Tensor, shape: tuple[int, int]) -> bool:
    """Whether what a rank leaves is spread over directions as independent entries of one size would be (Marchenko and Pastur).

    Its largest singular value must not stand out of the bulk; and outside its leading half, as outside all directions that are
    known, there must be the energy that such a matrix has there. Too few directions decide nothing; if the remainder is a good
    part of D, half of all directions must be known.

    Args:
        rank: The rank, k.
        values: Singular values inside a basis, [p].
        tails: |D|_F^2 without the leading 0 to p of them.
        shape: (m, n).

    Returns:
        Whether it is.
    """
    m, n = (size - rank for size in shape)
    known = min(len(values) - rank, min(m, n) - max(4, min(m, n) // 8))  # the last few are decided by chance
    needed = min(m, n) // 2 if tails[rank] > LARGE**2 * tails[0] else max(6, min(rank // 8, 32))
    if known < needed or values[rank] > FLAT * (tails[rank] / (m * n)) ** 0.5 * (m**0.5 + n**0.5):
        return False
    splits = ((min(known, min(m, n) // 2), SPREAD), (known, DEEP))
    return all(bool(tails[rank + k] >= least * tails[rank] * _outside_share(m, n, k)) for k, least in splits)


def _outside_share(m: int, n: int, leading: int) -> float:
    """The share of |X|_F^2 outside the leading singular directions of a matrix of independent entries."""
    ratio = min(m, n) / max(m, n)
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    x = low + (high - low) * (torch.arange(4000, 0, -1, dtype=torch.float64) - 0.5) / 4000  # the largest first
    density = ((high - x) * (x - low)).sqrt() / x
    outside = density.cumsum(0) / density.sum() > leading / min(m, n)
    return float((x * density * outside).sum() / (x * density).sum())


def _more(change: Difference, q: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """An orthonormal block [m, width], orthogonal to q, of the leading directions of what q leaves of D."""
    y = change.times(torch.randn(change.shape[1], width, generator=generator, dtype=torch.float64))
    z = torch.linalg.qr(change.transposed(_outside(y, q)))[0]
    return _outside(change.times(z), q)


def _outside(y: Tensor, q: Tensor) -> Tensor:
    """An orthonormal basis of y, orthogonal to q; two passes are enough."""
    for _ in range(2):
        y = torch.linalg.qr(y - q @ (q.t() @ y))[0]
    return y


def _settle(change: Difference, q: Tensor, r: Tensor, remaining: ResidualSums) -> tuple[Tensor, Tensor, ResidualSums]:
    """Move ``change.decay`` to where the remainder no longer correlates with START, and the basis with it."""
    for _ in range(12):
        if (
            remaining.energy <= remaining.rounding
            or abs(remaining.along) < ALONG / 4 * (remaining.start * remaining.energy) ** 0.5
        ):
            break
        v = torch.linalg.qr(r.t())[0]
        outside = change.outside(q, v)
        chance = 6 / ((change.shape[0] - q.shape[1]) * (change.shape[1] - q.shape[1])) ** 0.5  # of independent entries
        if outside <= 0 or abs(remaining.along) < max(ALONG, chance) * (outside * remaining.energy) ** 0.5:
            break
        was, change.decay = change.decay, change.decay + remaining.along / outside
        moved = torch.linalg.qr(change.times(torch.linalg.qr(change.transposed(q))[0]))[0]
        inner = change.transposed(moved).t()
        after = change.residual(moved, inner)
        if after.energy >= remaining.energy:
            change.decay = was
            break
        q, r, remaining = moved, inner, after
    return q, r, remaining


def _decay_of(change: Difference, factors: Factors, left: ResidualSums) -> float:
    """The factor of START, estimated from what factors of a part leave; it is reported, and changes nothing else."""
    q, v = (torch.linalg.qr(side)[0] for side in (factors.left, factors.right.t()))
    outside = change.outside(q, v)
    if outside <= 0 or abs(left.along) < 2 * ALONG * (outside * left.energy) ** 0.5:
        return 1.0
    return 1.0 + left.along / outside


def _left_vectors(change: Difference) -> Tensor:
    """All left singular vectors of D."""
    dense = torch.cat([block for _, block, _ in change.blocks()])
    left: Tensor = torch.linalg.svd(dense, full_matrices=False)[0]
    return left


def _divided(q: Tensor, r: Tensor, rank: int) -> Factors:
    """The product of q and r cut to a rank, its singular values divided evenly between the two sides."""
    tall, small = torch.linalg.qr(r.t())  # [n, p] and [p, p]
    u, values, vh = torch.linalg.svd(small.t(), full_matrices=False)
    root = values[:rank].sqrt()
    return Factors((q @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ tall.t()))
