"""Bases as matrices: P z Q^T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.maps.base import LinearMap, as_gradient
from lingrad.maps.factors import Factors
from lingrad.tensors import cast, on_tensor_cores

BLOCK = 2**22  # elements of a lift that are formed at a time


@final
@dataclass(frozen=True, eq=False)
class KroneckerMap(LinearMap):
    """``lift(z) = left @ z @ right.T``; a one-sided map has None on the other side.

    Args:
        left: P [m, p], or None for the identity.
        right: Q [n, q], or None for the identity.
    """

    left: Tensor | None
    right: Tensor | None

    @override
    def lift(self, coords: Tensor) -> Tensor:
        if self.left is not None:
            coords = cast(self.left, coords.dtype) @ coords
        if self.right is not None:
            coords = coords @ cast(self.right, coords.dtype).t()
        return coords

    @override
    def factors(self, coords: Tensor) -> Factors:
        left, right = (None if side is None else cast(side, coords.dtype) for side in (self.left, self.right))
        if left is not None and right is not None:
            thin = left.shape[1] <= right.shape[1]  # the rank is the smaller of the two
            return Factors(left, coords @ right.t()) if thin else Factors(left @ coords, right.t())
        if left is not None:
            return Factors(left, coords)
        return super().factors(coords) if right is None else Factors(coords, right.t())

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        return as_gradient(grad).product(self.left, self.right)

    @property
    @override
    def T(self) -> KroneckerMap:
        return KroneckerMap(self.right, self.left)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.left, self.right) if t is not None)

    @property
    @override
    def aligned(self) -> bool:
        return self.left is None

    @override
    def part(self, rows: slice, coords: Tensor) -> tuple[KroneckerMap, Tensor]:
        return (self if self.left is None else KroneckerMap(self.left[rows], self.right)), coords

    @property
    @override
    def inner(self) -> KroneckerMap:
        return self if self.right is None else KroneckerMap(self.left, None)

    @property
    @override
    def core(self) -> KroneckerMap:
        return _IDENTITY

    @override
    def reduce(self, x: Tensor) -> Tensor:
        return x if self.right is None else x @ cast(self.right, x.dtype)

    @override
    def reduce_grad(self, out_grad: Tensor) -> Tensor:
        return out_grad if self.left is None else out_grad @ cast(self.left, out_grad.dtype)

    @override
    def project_reduced(self, out_grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype != out_grad.dtype and on_tensor_cores(out_grad) and not torch.compiler.is_dynamo_compiling():
            return torch.mm(out_grad.t(), x, out_dtype=dtype)  # its sums are in float32 in any case
        return cast(out_grad.t() @ x, dtype)

    @override
    def expand(self, y: Tensor) -> Tensor:
        return y if self.left is None else y @ cast(self.left, y.dtype).t()

    @override
    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.expand(self.reduce(x) @ cast(coords, x.dtype).t())

    @override
    def add_apply_(self, out: Tensor, x: Tensor, coords: Tensor) -> None:
        y = self.reduce(x)
        y = y.reshape(-1, y.shape[-1])
        first = cast(coords, out.dtype).t()
        rows = out.view(-1, out.shape[-1])
        if self.left is None:
            rows.addmm_(y, first)
        else:
            rows.addmm_(y @ first, cast(self.left, out.dtype).t())

    @override
    def add_lift(self, weight: Tensor, coords: Tensor) -> Tensor:
        factors = self._factors(coords)
        if len(factors) == 1 or any(f.dtype != weight.dtype for f in factors):
            return super().add_lift(weight, coords)
        return torch.addmm(weight, *two_factors(factors))

    @override
    def lifts_cheaper(self, tokens: int, shape: tuple[int, int]) -> bool:
        m, n = shape
        p = None if self.left is None else self.left.shape[1]
        q = None if self.right is None else self.right.shape[1]
        if p is None or q is None:
            rank, across, along = (p or 0, n, m) if q is None else (q, m, n)
            return rank > 0 and tokens * (2 * across + along) > 2 * m * n
        return tokens * (2 * p * q + p * m + q * n) > 2 * (m * p * q + m * q * n)

    def _factors(self, coords: Tensor) -> list[Tensor]:
        return [f for f in (self.left, coords, None if self.right is None else self.right.t()) if f is not None]

    @override
    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        left, right, dtype = self.left, self.right, weight.dtype
        if coords.dtype == dtype:  # what each step of optimizer mode does, without a list of factors
            if left is None and right is not None and right.dtype == dtype:
                weight.addmm_(coords, right.t())
                return
            if right is None and left is not None and left.dtype == dtype:
                weight.addmm_(left, coords)
                return
        factors = self._factors(coords)
        if len(factors) == 1 or any(f.dtype != weight.dtype for f in factors):
            # mixed dtypes: lifted in the coords' dtype and rounded once, in the sum; in blocks of rows, since a float32 lift
            # takes twice the memory of a bfloat16 weight
            rows = max(1, BLOCK // weight.shape[1])
            for start in range(0, len(weight), rows):
                block = slice(start, start + rows)
                part = self if self.left is None else KroneckerMap(self.left[block], self.right)
                weight[block].add_(part.lift(coords[block] if self.left is None else coords))
            return
        weight.addmm_(*two_factors(factors))

    @override
    def add_rounded_lift_(self, weight: Tensor, coords: Tensor) -> None:
        factors = self._factors(coords)
        if len(factors) == 1:  # the identity has no product
            self.add_lift_(weight, coords)
        else:
            weight.addmm_(*two_factors([cast(f, weight.dtype) for f in factors]))

    @override
    def residual(self, matrix: Tensor) -> Tensor:
        return matrix - nearest(self.left, nearest(self.right, matrix.mT).mT)

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


_IDENTITY = KroneckerMap(None, None)


def nearest(side: Tensor | None, matrix: Tensor) -> Tensor:
    """P (P^T P)^-1 P^T M, the matrix in the columns' span that is nearest to M; M itself without a basis.

    Args:
        side: P [..., m, p], or None. Columns that depend on each other are allowed.
        matrix: M [..., m, n], at least float32.

    Returns:
        [..., m, n].
    """
    if side is None:
        return matrix
    side = cast(side, matrix.dtype)
    gram, right = side.mT @ side, side.mT @ matrix
    shifted = gram.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    # so that the factorisation of dependent columns has no pivot that rounding makes negative
    diagonal += 8 * gram.shape[-1] * torch.finfo(gram.dtype).eps * diagonal.mean(-1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(shifted)
    found = torch.cholesky_solve(right, factor)
    found = found + torch.cholesky_solve(right - gram @ found, factor)  # takes the shift back but for its square
    return side @ found


def two_factors(factors: list[Tensor]) -> list[Tensor]:
    """Two or three factors as two: the first two of three are multiplied, in their own dtype."""
    return factors if len(factors) == 2 else [factors[0] @ factors[1], factors[2]]


def _both_sides(new: KroneckerMap, old: KroneckerMap, coords: Tensor, *, power: int) -> Tensor:
    """Apply (new.T @ old)**power, elementwise, from each side that has a basis."""

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(coords.dtype).t() @ b.to(coords.dtype)) ** power

    if new.left is not None and old.left is not None:
        coords = overlap(new.left, old.left) @ coords
    if new.right is not None and old.right is not None:
        coords = coords @ overlap(new.right, old.right).t()
    return coords
