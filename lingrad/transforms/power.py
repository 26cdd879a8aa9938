"""`power`: warm-started subspace iteration (PowerSGD, Vogels et al. 2019, arXiv 1905.13727; LDAdam, arXiv 2410.16103)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lingrad._typing import override
from lingrad.errors import require
from lingrad.gradient import Gradient, wide
from lingrad.transforms.base import Bases, GradientBasis, When
from lingrad.transforms.factorize import align_signs, derive_seed, orthonormalize
from lingrad.transforms.registry import register


@register("power")
@final
@dataclass(frozen=True, kw_only=True)
class Power(GradientBasis):
    """Subspace iteration from the old basis: P <- qr(G qr(G^T P)), from two products of the gradient.

    With ``side=both`` one iteration is P <- qr(G Q), Q <- qr(G^T P), one product each.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        iters: Iterations at each refresh.

    Raises:
        SpecError: An option is out of range.
    """

    iters: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.iters >= 1, "iters", f"iters must be at least 1, not {self.iters}")

    @override
    def bases(self, grad: Gradient, old: Bases, when: When) -> Bases:
        grad = grad.to(wide(grad.dtype))
        left, right = old
        for _ in range(self.iters):
            if left is not None and right is not None:
                left = _span(grad.matmul(right), when, "left")
                right = _span(grad.rmatmul(left).t(), when, "right")
            elif left is not None:
                left = _iterate(grad, left, when, "left")
            elif right is not None:
                right = _iterate(grad.T, right, when, "right")
        return Bases(align_signs(left, old.left), align_signs(right, old.right))


def _iterate(grad: Gradient, basis: Tensor, when: When, side: str) -> Tensor:
    # a QR between the two products: of both at once the QR would see the square of the condition number
    other = _span(grad.rmatmul(basis).t(), when, f"{side}, halfway")
    return _span(grad.matmul(other), when, side)


def _span(columns: Tensor, when: When, side: str) -> Tensor:
    return orthonormalize(columns, seed=derive_seed(when.seed, when.step, side))
