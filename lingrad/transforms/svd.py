"""`svd`: the leading singular vectors of the gradient (GaLore: Zhao et al., ICML 2024, arXiv 2403.03507, section 4).

A sample of them is SARA's (Zhang et al., NeurIPS 2025, arXiv 2502.05790). As many as a share of the gradient takes are
AdaRankGrad's (Refael et al., ICLR 2025, arXiv 2410.17881).
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.errors import require
from lingrad.gradients.base import Gradient
from lingrad.transforms.base import Reads, When
from lingrad.transforms.linalg import align_signs, derive_seed, fix_signs, leading_vectors
from lingrad.transforms.registry import register
from lingrad.transforms.side import Sides, SideTransform

POWERS = {"leading": None, "sigma": 1.0, "sqrt_sigma": 0.5}  # of the singular value, to which probabilities are proportional


@register("svd")
@final
class SVD(SideTransform):
    """Leading singular vectors of the gradient at each refresh, or a sample of its singular vectors.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        schedule: What decides every ``every`` steps whether to refresh: ``energy()``, ``overlap()``, ``path()``; or None.
        solver: ``exact`` forms the gradient and takes its SVD; ``gram`` takes the eigenvectors of its smaller Gram matrix;
            ``randomized`` takes the leading singular vectors of a sketch of it (Halko, Martinsson, Tropp 2011, section 4.1, in
            one pass), which are used from the next step on.
        oversample: Columns of the sketch beyond ``rank``; None means another ``rank``. Only with ``solver=randomized``.
        precision: ``auto`` computes in at least float32, ``float32`` in float32 always, as galore_torch does.
        align: Keep the signs of the old basis's columns, on which moments depend; of a sample, whose columns have no fixed
            places, give each vector the sign it has against a fixed random one.
        choice: ``leading``; or drawn without replacement from all singular vectors (with ``solver=randomized`` from those of
            the sketch), with a probability proportional to the singular value, ``sigma``, or to its root, ``sqrt_sigma``.
        energy: Of ``choice=leading``: at each refresh use the fewest columns, at most ``rank``, that capture this share of
            |G|_F^2 (AdaRankGrad's information threshold); above 0, at most 1. The columns after them are zero until the next
            refresh, so that no shape and no memory changes. With ``solver=randomized`` the share is that of the sketch, which
            captures more of itself than of the gradient. None uses ``rank`` columns always.

    Raises:
        SpecError: An option is out of range, or belongs to another solver.
    """

    solver: Literal["exact", "gram", "randomized"] = "exact"
    oversample: int | None = None
    precision: Literal["auto", "float32"] = "auto"
    align: bool = True
    choice: Literal["leading", "sigma", "sqrt_sigma"] = "leading"
    energy: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(
            self.oversample is None or self.solver == "randomized",
            "oversample",
            f"oversample is used by solver=randomized only, not by solver={self.solver}; leave it out",
        )
        require(
            self.oversample is None or self.oversample >= 0,
            "oversample",
            f"oversample must be 0 or more, not {self.oversample}",
        )
        require(
            self.energy is None or 0.0 < self.energy <= 1.0,
            "energy",
            f"energy is the share of |G|_F^2 to capture, above 0 and at most 1, not {self.energy}",
        )
        require(
            self.energy is None or self.choice == "leading",
            "energy",
            f"energy counts leading singular vectors, and choice={self.choice} draws a sample; leave out one of them",
        )

    @property
    @override
    def reads(self) -> Reads:
        return "sketch" if self.solver == "randomized" else "gradient"

    @override
    def columns(self, rank: int) -> int:
        return rank + (rank if self.oversample is None else self.oversample)

    @override
    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        # turned back into the weight's orientation: the two sides of a weight are completed by different seeded vectors
        found = (
            self.bases(seen.T, Sides(None, old), when).right
            if when.side == "right"
            else self.bases(seen, Sides(old, None), when).left
        )
        assert found is not None  # noqa: S101 - its old basis was given
        return found

    @override
    def bases(self, grad: Gradient, old: Sides, when: When) -> Sides:
        if self.precision == "float32":
            grad = grad.to(torch.float32)
        ranks = (None if basis is None else basis.shape[1] for basis in old)
        # of a sketch in float32 the Gram matrix in float64 loses nothing, and is faster
        by_gram = self.solver == "gram" or (self.solver == "randomized" and grad.dtype != torch.float64)
        seed = derive_seed(when.seed, when.step)
        left, right = leading_vectors(
            grad,
            *ranks,
            solver="gram" if by_gram else "exact",
            sample=POWERS[self.choice],
            energy=self.energy,
            seed=seed,
        )
        if not self.align:
            return Sides(left, right)
        if self.energy is not None:  # a column that was zero has no sign: it takes that against a fixed vector
            left, right = fix_signs(left, when.seed), fix_signs(right, when.seed)
        if self.choice == "leading":
            return Sides(align_signs(left, old.left), align_signs(right, old.right))
        return Sides(fix_signs(left, when.seed), fix_signs(right, when.seed))
