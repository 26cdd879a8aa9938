"""`svd`: the leading singular vectors of the gradient (GaLore: Zhao et al., ICML 2024, arXiv 2403.03507, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from typing_extensions import override

from lingrad.errors import require
from lingrad.gradients.base import Gradient
from lingrad.transforms.base import Probe, Reads, Sketch, When
from lingrad.transforms.linalg import align_signs, derive_seed, leading_vectors
from lingrad.transforms.registry import register
from lingrad.transforms.side import Bases, GradientBasis
from lingrad.transforms.sketch import by_side, range_probes, sketched


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
            ``randomized`` takes the leading singular vectors of a sketch of it (Halko, Martinsson, Tropp 2011, section 4.1, in
            one pass), which serve from the next step on.
        oversample: Columns of the sketch beyond ``rank``; None is as many again. Only with ``solver=randomized``.
        precision: ``auto`` computes in at least float32, ``float32`` in float32 always, as galore_torch does.
        align: Keep the signs of the old basis's columns, which the moments refer to.

    Raises:
        SpecError: An option is out of range, or belongs to another solver.
    """

    solver: Literal["exact", "gram", "randomized"] = "exact"
    oversample: int | None = None
    precision: Literal["auto", "float32"] = "auto"
    align: bool = True

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

    @property
    @override
    def reads(self) -> Reads:
        return "sketch" if self.solver == "randomized" else "gradient"

    @override
    def bases(self, grad: Gradient, old: Bases, when: When) -> Bases:
        if self.reads == "sketch":
            return self.learn(old, sketched(grad, self.probes(old, when)), when)
        return self._leading(grad, old, when)

    @override
    def probes(self, state: Bases, when: When) -> tuple[Probe, ...]:
        rank = next(basis.shape[1] for basis in state if basis is not None)
        return range_probes(state, rank + (rank if self.oversample is None else self.oversample), when)

    @override
    def learn(self, state: Bases, sketch: Sketch, when: When) -> Bases:
        left, right = by_side(state, sketch)
        found = Bases(
            None if left is None else self._leading(left, Bases(state.left, None), when).left,
            None if right is None else self._leading(right.T, Bases(None, state.right), when).right,
        )
        return self.in_dtype(found, state)

    def _leading(self, grad: Gradient, old: Bases, when: When) -> Bases:
        """Singular vectors on the sides that have an old basis, as many as it has columns."""
        if self.precision == "float32":
            grad = grad.to(torch.float32)
        ranks = (None if basis is None else basis.shape[1] for basis in old)
        # of a sketch in float32 the Gram matrix, which is in float64, tells all that there is to tell
        by_gram = self.solver == "gram" or (self.solver == "randomized" and grad.dtype != torch.float64)
        solver = "gram" if by_gram else "exact"
        found = leading_vectors(grad, *ranks, solver=solver, seed=derive_seed(when.seed, when.step))
        return Bases(*map(align_signs, found, old)) if self.align else Bases(*found)
