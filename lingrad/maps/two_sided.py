"""Two maps of any kinds, one on each side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.maps.base import LinearMap
from lingrad.maps.factors import Factors
from lingrad.maps.kronecker import KroneckerMap
from lingrad.tensors import cast


@final
@dataclass(frozen=True, eq=False)
class TwoSidedMap(LinearMap):
    """A left map and a right map of any kinds: ``lift(z) = left.lift(right.lift(z))``.

    Args:
        left: A map with no right factor: it takes [p, q] to [m, q] for any q.
        right: A map with no left factor: it takes [p, q] to [p, n] for any p.
    """

    left: LinearMap
    right: LinearMap

    @override
    def lift(self, coords: Tensor) -> Tensor:
        return self.left.lift(self.right.lift(coords))

    @override
    def factors(self, coords: Tensor) -> Factors:
        return self.left.factors(self.right.lift(coords))

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        return self.right.project(self.left.project(grad))

    @property
    @override
    def T(self) -> TwoSidedMap:
        return TwoSidedMap(self.right.T, self.left.T)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.left.tensors, *self.right.tensors)

    @override
    def part(self, rows: slice, coords: Tensor) -> tuple[TwoSidedMap, Tensor]:
        left, taken = self.left.part(rows, coords)
        return TwoSidedMap(left, self.right), taken

    @property
    @override
    def inner(self) -> LinearMap:
        return self.left

    @override
    def reduce(self, x: Tensor) -> Tensor:
        return self.right.reduce(x)

    @override
    def expand(self, y: Tensor) -> Tensor:
        return self.left.expand(y)

    @override
    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.left.apply(self.reduce(x), coords)

    @override
    def add_rounded_lift_(self, weight: Tensor, coords: Tensor) -> None:
        self.left.add_rounded_lift_(weight, self.right.lift(cast(coords, weight.dtype)))

    @override
    def residual(self, matrix: Tensor) -> Tensor:
        dropped = self.right.residual(matrix)
        return self.left.residual(matrix - dropped).add_(dropped)

    @override
    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        if not isinstance(old, TwoSidedMap):
            return super().transport_squares(old, squares)
        return self.left.transport_squares(old.left, self.right.transport_squares(old.right, squares))


def two_sided(left: LinearMap, right: LinearMap) -> LinearMap:
    """Join a left map and a right map: S z = P z Q^T.

    Args:
        left: A map with no right factor.
        right: A map with no left factor.

    Returns:
        A `KroneckerMap` if both are, since its products are cheaper; otherwise a `TwoSidedMap`.
    """
    if isinstance(left, KroneckerMap) and isinstance(right, KroneckerMap):
        return KroneckerMap(left.left, right.right)
    return TwoSidedMap(left, right)
