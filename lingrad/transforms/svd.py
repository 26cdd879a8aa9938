"""`svd`: the leading singular vectors of the gradient (GaLore: Zhao et al., ICML 2024, arXiv 2403.03507, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch

from lingrad._typing import override
from lingrad.errors import require
from lingrad.gradient import Gradient
from lingrad.transforms.base import Bases, GradientBasis, When
from lingrad.transforms.factorize import align_signs, derive_seed, leading_vectors
from lingrad.transforms.registry import register

OVERSAMPLE, ITERS = 8, 2


@register("svd")
@final
@dataclass(frozen=True, kw_only=True)
class SVD(GradientBasis):
    """Leading singular vectors of the gradient at each refresh.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        solver: ``exact`` forms the gradient and takes its SVD; ``gram`` takes the eigenvectors of its smaller Gram matrix;
            ``randomized`` needs only products (Halko, Martinsson, Tropp 2011).
        oversample: Extra columns of the randomized sketch; None is 8. Only with ``solver=randomized``.
        iters: Power iterations of the randomized sketch; None is 2. Only with ``solver=randomized``.
        precision: ``auto`` computes in at least float32, ``float32`` in float32 always, as galore_torch does.
        align: Keep the signs of the old basis's columns, which the moments refer to.

    Raises:
        SpecError: An option is out of range, or belongs to another solver.
    """

    solver: Literal["exact", "gram", "randomized"] = "exact"
    oversample: int | None = None
    iters: int | None = None
    precision: Literal["auto", "float32"] = "auto"
    align: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for option in ("oversample", "iters"):
            value = getattr(self, option)
            require(
                value is None or self.solver == "randomized",
                option,
                f"{option} is used by solver=randomized only, not by solver={self.solver}; leave it out",
            )
            require(value is None or value >= 0, option, f"{option} must be 0 or more, not {value}")

    @override
    def bases(self, grad: Gradient, old: Bases, when: When) -> Bases:
        if self.precision == "float32":
            grad = grad.to(torch.float32)
        left, right = leading_vectors(
            grad,
            old.left if old.left is None else old.left.shape[1],
            old.right if old.right is None else old.right.shape[1],
            solver=self.solver,
            seed=derive_seed(when.seed, when.step),
            oversample=OVERSAMPLE if self.oversample is None else self.oversample,
            iters=ITERS if self.iters is None else self.iters,
        )
        if not self.align:
            return Bases(left, right)
        return Bases(align_signs(left, old.left), align_signs(right, old.right))
