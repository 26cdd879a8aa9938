"""`weight`: the leading singular vectors of the weight itself, as of LoRA-XS (Bałazy et al., 2024, arXiv 2405.17604)."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.transforms.base import When
from lingrad.transforms.linalg import derive_seed, fix_signs, leading_vectors
from lingrad.transforms.registry import register
from lingrad.transforms.side import Sides, SideTransform


@register("weight")
@final
class WeightVectors(SideTransform):
    """Leading singular vectors of the weight W, chosen when the run begins; no gradient is read.

    Coordinates start at zero on both sides as on one, so that training starts from W.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes, each from the weight as it is trained by then; 0 chooses once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        solver: ``exact`` takes the SVD of the weight; ``gram`` the eigenvectors of its smaller Gram matrix.

    Raises:
        SpecError: An option is out of range.
    """

    reads = "weight"

    every: int = 0
    solver: Literal["exact", "gram"] = "exact"

    @override
    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        found = (
            self.bases(seen.T, Sides(None, old), when)[1]
            if when.side == "right"
            else self.bases(seen, Sides(old, None), when)[0]
        )
        assert found is not None  # noqa: S101 - its old basis was given
        return found

    @override
    def bases(self, grad: Gradient, old: Sides, when: When) -> Sides:
        # signs not as in the old basis: training in it leaves the vectors that may follow orthogonal to it
        ranks = (None if basis is None else basis.shape[1] for basis in old)
        left, right = leading_vectors(grad, *ranks, solver=self.solver, seed=derive_seed(when.seed, when.step))
        return Sides(fix_signs(left, when.seed), fix_signs(right, when.seed))
