"""A change of one weight as a product of two thin matrices, and what can be done without forming it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lingrad.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Factors:
    """``left @ right``, the change of a weight read as the matrix [m, n] of its layout.

    Args:
        left: [m, r].
        right: [r, n].

    Raises:
        ShapeError: The two do not fit together.
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
        """Bytes of both."""
        return sum(t.numel() * t.element_size() for t in (self.left, self.right))

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
    """The sum of changes of one weight: columns beside columns, rows below rows, nothing lost.

    Args:
        parts: At least one, of one shape.

    Returns:
        Factors whose rank is the sum of theirs.

    Raises:
        ShapeError: There is none, or their shapes differ.
    """
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise ShapeError(f"changes of one shape were expected, and found {sorted(shapes) or 'none'}")
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts], 0))


def compress(factors: Factors, *, rank: int | None = None, tolerance: float = 0.0) -> tuple[Factors, float]:
    """The best factors of lower rank (Eckart-Young), by two QR and one SVD of [r, r], in float64.

    Args:
        factors: The change.
        rank: The most columns that may stay; None for as many as it takes.
        tolerance: Singular values up to this share of the largest are dropped; never fewer than those that float64 cannot
            tell from zero. At least one column stays.

    Returns:
        The factors, with singular values divided evenly between the two sides, in the dtype of ``factors``; and the norm of
        what was dropped, as a share of that of the whole (0 where the change is zero).
    """
    dtype = factors.left.dtype
    (q, r), (s, t) = (torch.linalg.qr(side.double()) for side in (factors.left, factors.right.t()))
    u, values, vh = torch.linalg.svd(r @ t.t(), full_matrices=False)
    floor = max(tolerance, max(factors.shape) * torch.finfo(torch.float64).eps)
    kept = max(1, int((values > floor * values[0]).sum()))
    kept = kept if rank is None else min(kept, rank)
    root = values[:kept].sqrt()
    total = float(values.norm())
    dropped = float(values[kept:].norm()) / total if total else 0.0
    return Factors(((q @ u[:, :kept]) * root).to(dtype), (root[:, None] * (s @ vh[:kept].t()).t()).to(dtype)), dropped
