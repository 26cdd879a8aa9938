"""Transforms with a basis of given rank on one side of the weight, or on both: the options, the sides, the state and the map.

`SideTransform` is the base class of a transform that finds its basis in the gradient or in a sketch: it writes one method, for
one side. `BasisTransform`, above it, has the options and nothing else, for a transform with a state of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.errors import ShapeError, SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.tensors import nbytes, wide
from lingrad.transforms.base import Probe, Ranks, Sketch, Transform, When
from lingrad.transforms.linalg import derive_seed, orthonormalize, start_basis
from lingrad.transforms.schedules import AdaptiveSchedule
from lingrad.transforms.sketch import by_side, range_probes, sketched

Side = Literal["short", "long", "left", "right", "both"]


class Sides(NamedTuple):
    """A left and a right basis, None on a side that has none: the state of a transform that stores nothing else.

    Args:
        left: [m, p], or None.
        right: [n, q], or None.
    """

    left: Tensor | None
    right: Tensor | None


@dataclass(frozen=True, kw_only=True)
class BasisTransform(Transform):
    """A transform with one basis of ``rank`` columns on one side of the weight, or on both.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once, in the first step.
        side: ``short`` puts the basis on the shorter dimension (right for a square weight), ``long`` on the other;
            ``left`` on the m rows, ``right`` on the n columns, ``both`` on both.
        clip: Lower the rank to min(m, n) where it does not fit, instead of raising.
        schedule: What decides, every ``every`` steps, whether to refresh; None refreshes each time. See
            `lingrad.transforms.schedules`.
    """

    rank: int
    every: int = 200
    side: Side = "short"
    clip: bool = False
    schedule: AdaptiveSchedule | None = None

    def __post_init__(self) -> None:
        """Check the shared options; a subclass that adds some calls this first."""
        super().__post_init__()
        require(self.rank >= 1, "rank", f"rank must be at least 1, not {self.rank}")
        require(self.every >= 0, "every", f"every must be 0 (refresh once) or more, not {self.every}")
        if self.schedule is not None:
            self.check_schedule()

    def check_schedule(self) -> None:
        """Refuse a ``schedule`` that would have nothing to decide; a subclass that supports none raises always.

        Raises:
            SpecError: It would not.
        """
        require(
            not self.before_step,
            "schedule",
            "a schedule asks whether the basis still fits the gradient, of which this transform reads nothing; leave schedule "
            "out",
        )
        require(
            self.every > 0,
            "schedule",
            "a schedule decides at every `every`-th step whether to refresh, and every=0 refreshes once; leave out one of them",
        )

    @override
    def ranks(self, shape: tuple[int, int]) -> Ranks:
        """The ranks of the left and the right basis; ``side`` is resolved here only.

        Args:
            shape: (m, n), the weight's shape.

        Returns:
            (p, q); None for a side that is not reduced.

        Raises:
            ShapeError: The rank exceeds min(m, n) and ``clip`` is off.
        """
        m, n = shape
        if self.rank > min(m, n) and not self.clip:
            raise ShapeError(
                f"rank {self.rank} is larger than min(m, n) = {min(m, n)} of a {m} x {n} weight; "
                "lower the rank, or let it be lowered where needed: clip=true"
            )
        rank = min(self.rank, m, n)
        right_is_short = m >= n
        left = self.side in ("left", "both") or self.side == ("long" if right_is_short else "short")
        right = self.side in ("right", "both") or self.side == ("short" if right_is_short else "long")
        return rank if left else None, rank if right else None

    @property
    @override
    def rule(self) -> AdaptiveSchedule | None:
        return self.schedule

    @property
    @override
    def period(self) -> int:
        return self.every

    @override
    def due(self, step: int) -> bool:
        return step == 0 or (self.every > 0 and step % self.every == 0)

    def start(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Sides:
        """Random bases of the right shapes, for a transform that has seen no gradient yet."""
        p, q = self.ranks(shape)
        left, right = (
            None if r is None else self.drawn(size, r, seed=derive_seed(seed, side), device=device, dtype=dtype)
            for side, size, r in zip(("left", "right"), shape, (p, q), strict=True)
        )
        return Sides(left, right)

    def drawn(self, size: int, rank: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A random basis [size, rank] with columns of unit length in expectation; orthonormal if a step is trained in it."""
        basis = start_basis(size, rank, seed=seed, device=device, dtype=wide(dtype))
        return (orthonormalize(basis, seed=seed) if self.reads == "sketch" else basis).to(dtype)


@dataclass(frozen=True, kw_only=True)
class SideTransform(BasisTransform):
    """A transform that defines how the basis of one side is computed; derive from it to write your own.

    A subclass defines `basis`. It is called for each side that has a basis, with that side in the rows, so that left and right
    are one and the same code. The class attribute ``reads`` says what it is given:

    - ``reads = "gradient"``, the default: the gradient; the new basis is used in the same step.
    - ``reads = "sketch"``: the gradient times a random matrix with `columns` columns; the gradient itself is never formed, and
      the new basis is used from the next step on. The first step trains in a random orthonormal basis.
    - ``reads = "weight"``: the weight of the forward, as a gradient; the new basis is used from that forward on.

    Start, state, dtype, checks and map are done here.
    """

    def __post_init__(self) -> None:
        """Check the options, and ``reads``.

        Raises:
            SpecError: An option is out of range, or ``reads`` is none of these.
        """
        super().__post_init__()
        if self.reads not in ("gradient", "sketch", "weight"):
            raise SpecError(
                f"{type(self).__name__}.reads must be 'gradient', 'sketch' or 'weight', not {self.reads!r}; "
                "a transform that reads nothing derives from BasisTransform"
            )

    @abstractmethod
    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        """The new basis of one side.

        Args:
            seen: [size, k], in at least float32. If the class reads the gradient: G [m, n] for a left basis, its transpose
                [n, m] for a right one. If it reads a sketch: the products of its size rows with a Gaussian matrix, k =
                ``columns(rank)``, or the same as a gradient where a sketch would not be smaller. If it reads the weight: W, or
                its transpose.
            old: [size, rank], the basis in use, in the weight's dtype; not to be written into.
            when: The step, the number of refreshes so far, the weight's seed, and the side.
                ``derive_seed(when.seed, when.step, when.side)`` seeds random numbers of this side.

        Returns:
            [size, rank], in any floating dtype.
        """

    def columns(self, rank: int) -> int:
        """Columns of the sketch, if the class reads one.

        Args:
            rank: Columns of the basis.

        Returns:
            1 or more; the default is ``rank``.
        """
        return rank

    def bases(self, grad: Gradient, old: Sides, when: When) -> Sides:
        """Both bases from the gradient; override it where one computation gives both, as an SVD does.

        Args:
            grad: G [m, n].
            old: The bases in use; None on a side that has none, where the result must be None too.
            when: The step, the number of refreshes so far, the weight's seed.

        Returns:
            Bases of the old shapes, in any floating dtype. The default calls `basis` for each side.
        """
        grad = grad.to(wide(grad.dtype))
        return self.each_side((grad, grad.T), old, when)

    def each_side(self, seen: tuple[Gradient | None, Gradient | None], old: Sides, when: When) -> Sides:
        """`basis` of each side that has one.

        Args:
            seen: What `basis` is given for the left and for the right side; None on a side without a basis.
            old: The bases in use.
            when: As for `basis`, but for the side.

        Returns:
            The new bases, in the dtypes of the old ones.
        """
        return Sides(self._side(seen[0], old.left, when, "left"), self._side(seen[1], old.right, when, "right"))

    def _side(self, seen: Gradient | None, old: Tensor | None, when: When, side: Literal["left", "right"]) -> Tensor | None:
        """The new basis of one side; cast before the other one is computed, for the sake of memory."""
        if old is None or seen is None:
            return None
        return self._fit(self.basis(seen, old, when._replace(side=side)), old, side)

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
        return self.start(shape, seed=seed, device=device, dtype=dtype)

    @override
    def refresh(self, state: Any, grad: Gradient | None, when: When) -> Any:
        if grad is None:
            raise SpecError(f"{self.name} reads a {self.reads}; it cannot be refreshed without one")
        if self.reads == "sketch":
            return self.learn(state, sketched(grad, self.probes(state, when)), when)
        return self._fitted(self.bases(grad, state, when), state)

    @override
    def probes(self, state: Any, when: When) -> tuple[Probe, ...]:
        if self.reads != "sketch":
            return ()
        rank = next(basis.shape[1] for basis in (state.left, state.right) if basis is not None)
        columns = self.columns(rank)
        if type(columns) is not int or columns < 1:
            raise SpecError(f"the columns method of {self.name} returned {columns!r}; expected a whole number, 1 or more")
        return range_probes((state.left, state.right), columns, when)

    @override
    def learn(self, state: Any, sketch: Sketch, when: When) -> Any:
        return self.each_side(by_side(state, sketch), state, when)

    @override
    def map(self, state: Any) -> LinearMap:
        return KroneckerMap(state.left, state.right)

    def _fitted(self, new: Sides, old: Sides) -> Sides:
        """The new bases, of the old shapes and dtypes, each in memory of its own."""
        if not (isinstance(new, tuple) and len(new) == 2):
            raise ShapeError(f"the bases method of {self.name} returned {_described(new)}; expected Sides(left, right)")
        left, right = (self._fit(*pair) for pair in zip(new, old, ("left", "right"), strict=True))
        return Sides(left, right)

    def _fit(self, new: Tensor | None, old: Tensor | None, side: str) -> Tensor | None:
        if new is None and old is None:
            return None
        if old is None or not isinstance(new, Tensor) or new.shape != old.shape or not new.is_floating_point():
            raise ShapeError(f"{self.name} returned {_described(new)} as its {side} basis; expected {_expected_basis(old)}")
        new = new.to(old.dtype)
        owned = new.is_contiguous() and new.untyped_storage().nbytes() == nbytes(new)
        return new if owned else new.clone(memory_format=torch.contiguous_format)  # a slice would keep all columns in memory


def _described(found: object) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)} and {found.dtype}"
    return "None" if found is None else f"a {type(found).__name__}"


def _expected_basis(old: Tensor | None) -> str:
    return "None, since that side has none" if old is None else f"the old one's shape, {tuple(old.shape)}, in a floating dtype"
