"""A change of one weight as a product of two thin matrices, and operations that do not form it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lingrad.errors import ShapeError
from lingrad.tensors import nbytes


@dataclass(frozen=True, eq=False)
class Factors:
    """``left @ right``, the change of a weight read as the matrix [m, n] of its layout.

    Args:
        left: [m, r].
        right: [r, n].

    Raises:
        ShapeError: The two have no product.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        """Check that the product exists."""
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ShapeError(
                f"factors of shapes {tuple(self.left.shape)} and {tuple(self.right.shape)} have no product; "
                "expected [m, r] and [r, n]"
            )

    @property
    def rank(self) -> int:
        """r, the number of columns of ``left``; the rank of the product may be lower."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return nbytes(self.left, self.right)

    @property
    def T(self) -> Factors:  # noqa: N802 - the name torch and numpy give a transpose
        """The transposed change, [n, m]."""
        return Factors(self.right.t(), self.left.t())

    def dense(self) -> Tensor:
        """The change itself, [m, n]."""
        return self.left @ self.right

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Factors:
        """The factors in another dtype or on another device."""
        return Factors(*(t.to(device=device, dtype=dtype) for t in (self.left, self.right)))


def stack(parts: Sequence[Factors]) -> Factors:
    """The exact sum of changes of one weight: columns next to columns, rows below rows.

    Args:
        parts: One change or more, of one shape.

    Returns:
        Factors whose rank is the sum of theirs.

    Raises:
        ShapeError: There are none, or their shapes differ.
    """
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise ShapeError(f"expected changes of one shape, found {sorted(shapes) or 'none'}")
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts], 0))


def compress(factors: Factors, *, rank: int | None = None, tolerance: float = 0.0) -> tuple[Factors, float]:
    """The best factors of lower rank (Eckart-Young), by two QR and one SVD of [r, r], in float64.

    Args:
        factors: The change.
        rank: Largest rank of the result; None means no limit.
        tolerance: Singular values up to this fraction of the largest are dropped, and in any case those at the rounding error
            of float64. At least one column remains.

    Returns:
        The factors, with singular values divided evenly between the two sides, in the dtype of ``factors``; and the norm of
        what was dropped relative to the norm of the change (0 if the change is zero).
    """
    dtype = factors.left.dtype
    (q, r), (s, t) = (torch.linalg.qr(side.double()) for side in (factors.left, factors.right.t()))
    u, values, vh = torch.linalg.svd(r @ t.t(), full_matrices=False)
    floor = max(tolerance, max(factors.shape) * torch.finfo(torch.float64).eps)
    count = max(1, int((values > floor * values[0]).sum()))
    count = count if rank is None else min(count, rank)
    root = values[:count].sqrt()
    total = float(values.norm())
    dropped = float(values[count:].norm()) / total if total else 0.0
    return Factors(((q @ u[:, :count]) * root).to(dtype), (root[:, None] * (s @ vh[:count].t()).t()).to(dtype)), dropped


def padded(factors: Factors, rank: int) -> Factors:
    """The same change with columns of zeros up to a rank.

    Args:
        factors: The change, of at most that rank.
        rank: The rank.

    Returns:
        Factors of the rank; the same object where it has it already.
    """
    more = rank - factors.rank
    left, right = factors.left, factors.right
    zeros = left.new_zeros(left.shape[0], more), right.new_zeros(more, right.shape[1])
    return Factors(torch.cat([left, zeros[0]], 1), torch.cat([right, zeros[1]])) if more else factors
