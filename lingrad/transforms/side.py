"""Transforms with a basis of given rank on one side of the weight, or on both: options, orientation, state and map, done once.

A new transform derives from `GradientBasis` where it needs the gradient itself, from `SketchBasis` where products with
matrices that are fixed before the step are enough, and writes how its basis is found.
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
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms.base import Probe, Reads, Sketch, Transform, When
from lingrad.transforms.linalg import derive_seed, orthonormalize, start_basis
from lingrad.transforms.sketch import sketched

Side = Literal["short", "long", "left", "right", "both"]


class Bases(NamedTuple):
    """The state of a transform that is nothing but its bases."""

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
    """

    rank: int
    every: int = 200
    side: Side = "short"
    clip: bool = False

    def __post_init__(self) -> None:
        """Check the shared options; a subclass that adds some calls this first."""
        super().__post_init__()
        require(self.rank >= 1, "rank", f"rank must be at least 1, not {self.rank}")
        require(self.every >= 0, "every", f"every must be 0 (refresh once) or more, not {self.every}")

    def ranks(self, shape: tuple[int, int]) -> tuple[int | None, int | None]:
        """Columns of the left and the right basis; None where that side has none.

        Args:
            shape: (m, n), the weight's shape.

        Returns:
            (p, q); this is the one place where ``side`` meets a shape.

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

    @override
    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        left, right = self.ranks(shape)
        return left or shape[0], right or shape[1]

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        left, right = self.ranks(shape)
        return None if left is None else (shape[0], left), None if right is None else (shape[1], right)

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        return [TensorSpec(basis, dtype) for basis in self.basis_shapes(shape) if basis is not None]

    @property
    @override
    def period(self) -> int:
        return self.every

    @override
    def due(self, step: int) -> bool:
        return step == 0 or (self.every > 0 and step % self.every == 0)

    def start(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Bases:
        """Random bases of the right shapes, for a transform that has seen no gradient yet."""
        left, right = (
            None if s is None else self.drawn(*s, seed=derive_seed(seed, side), device=device, dtype=dtype)
            for side, s in zip(("left", "right"), self.basis_shapes(shape), strict=True)
        )
        return Bases(left, right)

    def drawn(self, size: int, rank: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A random basis [size, rank]: columns of unit length in expectation, orthonormal where a step is trained in it."""
        basis = start_basis(size, rank, seed=seed, device=device, dtype=wide(dtype))
        return (orthonormalize(basis, seed=seed) if self.reads == "sketch" else basis).to(dtype)


@dataclass(frozen=True, kw_only=True)
class GradientBasis(BasisTransform):
    """A transform whose bases are functions of the gradient and the old bases, and whose state is just those bases.

    A subclass writes `bases`; orientation, start, dtype and map are done here.
    """

    @abstractmethod
    def bases(self, grad: Gradient, old: Bases, when: When) -> Bases:
        """The new bases.

        Args:
            grad: G [m, n]; use ``grad.T`` to write a right basis with the code of a left one.
            old: The bases in use; None on the side that has none, where the result must be None too.
            when: The step, the number of refreshes so far, the weight's seed.

        Returns:
            Bases of the old shapes, in any floating dtype.
        """

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Bases:
        return self.start(shape, seed=seed, device=device, dtype=dtype)

    @override
    def refresh(self, state: Bases, grad: Gradient | None, when: When) -> Bases:
        if grad is None:
            raise SpecError(
                f"{self.name} says that it reads {self.reads}; derive it from BasisTransform, not from GradientBasis"
            )
        new = self.bases(grad, state, when)
        for found, old, side in zip(new, state, ("left", "right"), strict=True):
            shapes = [None if b is None else tuple(b.shape) for b in (found, old)]
            if shapes[0] != shapes[1]:
                raise ShapeError(
                    f"the bases method of {self.name} gave a {side} basis of shape {shapes[0]}; expected {shapes[1]}"
                )
        return self.in_dtype(new, state)

    @override
    def map(self, state: Bases) -> LinearMap:
        return KroneckerMap(state.left, state.right)

    @staticmethod
    def in_dtype(new: Bases, old: Bases) -> Bases:
        """The new bases in the dtypes of the old ones."""
        return Bases(*(b if b is None or o is None else b.to(o.dtype) for b, o in zip(new, old, strict=True)))


@dataclass(frozen=True, kw_only=True)
class SketchBasis(BasisTransform):
    """A transform whose bases are learned from products of the gradient with matrices that are fixed before the step.

    A subclass writes `probes` and `learn`; the gradient is never formed, whatever the number of micro-batches. The first
    step trains in a random orthonormal basis.
    """

    @property
    @override
    def reads(self) -> Reads:
        return "sketch"

    @abstractmethod
    @override
    def probes(self, state: Any, when: When) -> tuple[Probe, ...]:
        """The products to learn from; see `Transform.probes`."""

    @abstractmethod
    @override
    def learn(self, state: Any, sketch: Sketch, when: When) -> Any:
        """The new state; see `Transform.learn`."""

    @override
    def refresh(self, state: Any, grad: Gradient | None, when: When) -> Any:
        if grad is None:
            raise SpecError(f"{self.name} reads a sketch; it cannot be refreshed from nothing")
        return self.learn(state, sketched(grad, self.probes(state, when)), when)
