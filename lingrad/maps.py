"""Linear maps from a small space of coordinates to a weight: the one place that knows their products.

Layout: a weight is W [m, n] = [out, in]; coordinates are z [p, q]. A left basis P is [m, p], a right basis Q is [n, q],
and ``lift(z) = P z Q^T``, a missing factor meaning the identity (then p = m, or q = n).

The duality needs nothing but linearity (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3): orthonormal
columns are welcome, never required.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lingrad._typing import override
from lingrad.errors import DualityError
from lingrad.gradient import DenseGradient, Gradient

BLOCK = 2**22  # numbers of a lift that are formed at a time


class LinearMap(ABC):
    """An immutable linear map S from coordinates z [p, q] to a weight [m, n].

    Laws, for any coordinates z, gradient G and layer input x:

    - adjoint: ``<lift(z), G> == <z, project(G)>``, so that autograd of ``lift`` is ``project``;
    - action: ``apply(x, z) == x @ lift(z).T``;
    - transpose: ``T.lift(z.T) == lift(z).T``;
    - reduction: ``inner.apply(reduce(x), z) == apply(x, z)`` and, for G = dY^T X,
      ``inner.project(dY^T reduce(X)) == project(G)``.
    """

    @abstractmethod
    def lift(self, coords: Tensor) -> Tensor:
        """S z: [p, q] -> [m, n], in the dtype of ``coords``."""

    @abstractmethod
    def project(self, grad: Gradient | Tensor) -> Tensor:
        """S^T G, the adjoint of ``lift``: [m, n] -> [p, q], in the dtype of ``grad``."""

    @property
    @abstractmethod
    def T(self) -> LinearMap:  # noqa: N802 - the name torch and numpy give a transpose
        """The map whose lift of z^T is the transpose of this one's lift of z."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the map holds."""

    @property
    def inner(self) -> LinearMap:
        """The map that is left for ``reduce(x)`` in place of x; this map itself where nothing can be reduced."""
        return self

    def reduce(self, x: Tensor) -> Tensor:
        """All that the map's products need of a layer input: [..., n] -> [..., q] where a right factor allows it."""
        return x

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        """Act as the layer with weight ``lift(coords)``: [..., n] -> [..., m], in the dtype of ``x``."""
        return x @ self.lift(coords).to(x.dtype).t()

    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        """``weight += lift(coords)`` in place, [m, n]; without a temporary where the dtypes allow it."""
        weight.add_(self.lift(coords))

    def norm(self, coords: Tensor) -> Tensor:
        """|S z|_F, 0-d; without the lift where the map allows it."""
        norm: Tensor = torch.linalg.vector_norm(self.lift(coords))
        return norm

    def transport(self, old: LinearMap, coords: Tensor) -> Tensor:
        """S^T S_old z: coordinates of another map's lift under this one (the ``rotate`` carry), [p, q]."""
        return self.project(old.lift(coords))

    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        """The matching transport of elementwise second moments: (C o C) v for C = S^T S_old, which keeps v >= 0.

        This is the variance of C g for a g with uncorrelated entries of variance v.

        Args:
            old: The map the second moments belong to.
            squares: v [p, q], non-negative.

        Raises:
            DualityError: The map has no cheap elementwise square; one that has returns [p, q], non-negative.
        """
        raise DualityError(
            f"carry='rotate' needs the square of S_new^T S_old, which {type(self).__name__} does not offer; "
            "use carry='keep' or carry='reset'"
        )


@final
@dataclass(frozen=True, eq=False)
class KroneckerMap(LinearMap):
    """``lift(z) = left @ z @ right.T``: left, right and two-sided bases are the same lines with a None.

    Args:
        left: P [m, p], or None for the identity.
        right: Q [n, q], or None for the identity.
    """

    left: Tensor | None
    right: Tensor | None

    @override
    def lift(self, coords: Tensor) -> Tensor:
        if self.left is not None:
            coords = self.left.to(coords.dtype) @ coords
        if self.right is not None:
            coords = coords @ self.right.to(coords.dtype).t()
        return coords

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        return as_gradient(grad).product(self.left, self.right)

    @property
    @override
    def T(self) -> KroneckerMap:  # noqa: N802
        return KroneckerMap(self.right, self.left)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.left, self.right) if t is not None)

    @property
    @override
    def inner(self) -> KroneckerMap:
        return KroneckerMap(self.left, None)

    @override
    def reduce(self, x: Tensor) -> Tensor:
        return x if self.right is None else x @ self.right.to(x.dtype)

    @override
    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        y = self.reduce(x) @ coords.to(x.dtype).t()
        return y if self.left is None else y @ self.left.to(x.dtype).t()

    @override
    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        factors = [f for f in (self.left, coords, None if self.right is None else self.right.t()) if f is not None]
        if len(factors) == 1 or any(f.dtype != weight.dtype for f in factors):
            # mixed dtypes: lifted in the coords' dtype and rounded once, in the sum; in blocks of rows, since the lift of a
            # bfloat16 weight takes twice its memory
            rows = max(1, BLOCK // weight.shape[1])
            for start in range(0, len(weight), rows):
                block = slice(start, start + rows)
                part = self if self.left is None else KroneckerMap(self.left[block], self.right)
                weight[block].add_(part.lift(coords[block] if self.left is None else coords))
            return
        if len(factors) == 3:
            factors = [factors[0] @ factors[1], factors[2]]
        weight.addmm_(factors[0], factors[1])

    @override
    def norm(self, coords: Tensor) -> Tensor:
        return _both_sides(self, self, coords, power=1).mul(coords).sum().clamp_min(0).sqrt()

    @override
    def transport(self, old: LinearMap, coords: Tensor) -> Tensor:
        if not isinstance(old, KroneckerMap):
            return super().transport(old, coords)
        return _both_sides(self, old, coords, power=1)

    @override
    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        if not isinstance(old, KroneckerMap):
            return super().transport_squares(old, squares)
        return _both_sides(self, old, squares, power=2)


@final
@dataclass(frozen=True, eq=False)
class SelectionMap(LinearMap):
    """Coordinates are entries of the weight: ``lift`` scatters them to some rows and columns, ``project`` gathers.

    Args:
        rows: int64 indices [p] into m, without repeats, or None for all rows.
        columns: int64 indices [q] into n, without repeats, or None for all columns.
        shape: (m, n), the weight's shape.
    """

    rows: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]

    @override
    def lift(self, coords: Tensor) -> Tensor:
        m, n = self.shape
        if self.columns is not None:
            coords = coords.new_zeros(len(coords), n).index_copy(1, self.columns, coords)
        if self.rows is not None:
            coords = coords.new_zeros(m, coords.shape[1]).index_copy(0, self.rows, coords)
        return coords

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        return as_gradient(grad).select(self.rows, self.columns).dense()

    @property
    @override
    def T(self) -> SelectionMap:  # noqa: N802
        return SelectionMap(self.columns, self.rows, self.shape[::-1])

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.rows, self.columns) if t is not None)

    @property
    @override
    def inner(self) -> SelectionMap:
        columns = self.shape[1] if self.columns is None else len(self.columns)
        return SelectionMap(self.rows, None, (self.shape[0], columns))

    @override
    def reduce(self, x: Tensor) -> Tensor:
        return x if self.columns is None else x.index_select(-1, self.columns)

    @override
    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        y = self.reduce(x) @ coords.to(x.dtype).t()
        return y if self.rows is None else y.new_zeros(*y.shape[:-1], self.shape[0]).index_copy(-1, self.rows, y)

    @override
    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        chosen = [(side, indices) for side, indices in enumerate((self.rows, self.columns)) if indices is not None]
        if len(chosen) != 1:
            weight.add_(self.lift(coords))
        elif coords.dtype == weight.dtype:
            weight.index_add_(*chosen[0], coords)
        else:  # summed in the wider dtype and rounded once
            weight.index_copy_(*chosen[0], weight.index_select(*chosen[0]).add_(coords))

    @override
    def norm(self, coords: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(coords)
        return norm

    @override
    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        if not isinstance(old, SelectionMap):
            return super().transport_squares(old, squares)
        return self.project(old.lift(squares))  # S^T S_old is a 0-1 matrix, its own square


def as_gradient(grad: Gradient | Tensor) -> Gradient:
    """Read a plain matrix [m, n] as a gradient."""
    return DenseGradient(grad) if isinstance(grad, Tensor) else grad


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
    def project(self, grad: Gradient | Tensor) -> Tensor:
        return self.right.project(self.left.project(grad))

    @property
    @override
    def T(self) -> TwoSidedMap:  # noqa: N802
        return TwoSidedMap(self.right.T, self.left.T)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.left.tensors, *self.right.tensors)

    @property
    @override
    def inner(self) -> LinearMap:
        return self.left

    @override
    def reduce(self, x: Tensor) -> Tensor:
        return self.right.reduce(x)

    @override
    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.left.apply(self.reduce(x), coords)

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
        One `KroneckerMap` where both are, since its products are the cheaper ones; otherwise a `TwoSidedMap`.
    """
    if isinstance(left, KroneckerMap) and isinstance(right, KroneckerMap):
        return KroneckerMap(left.left, right.right)
    return TwoSidedMap(left, right)


def _both_sides(new: KroneckerMap, old: KroneckerMap, coords: Tensor, *, power: int) -> Tensor:
    """Apply (new.T @ old)**power, elementwise, from each side that has a basis."""

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(coords.dtype).t() @ b.to(coords.dtype)) ** power

    if new.left is not None and old.left is not None:
        coords = overlap(new.left, old.left) @ coords
    if new.right is not None and old.right is not None:
        coords = coords @ overlap(new.right, old.right).t()
    return coords
