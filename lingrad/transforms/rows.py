"""`rows`: the rows of the weight with the largest gradient (Grass: Muhamed et al., 2024, arXiv 2406.17660)."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.maps import LinearMap, SelectionMap
from lingrad.transforms.indices import IndexTransform, Indices
from lingrad.transforms.registry import register


@register("rows")
@final
class RowSelection(IndexTransform):
    """Rows of the weight (columns, on the right side), chosen by their norms in the gradient; the others are not trained.

    The map gathers and scatters, and nothing but indices is stored. Norms are taken of some rows of the gradient at a time.

    Args:
        rank: How many rows.
        every: Steps between refreshes; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        choice: ``top`` takes the largest norms; ``norm`` and ``square`` draw rows without replacement, with a probability
            proportional to the norm, or to its square.

    Raises:
        SpecError: An option is out of range.
    """

    choice: Literal["top", "norm", "square"] = "top"

    @property
    @override
    def power(self) -> float | None:
        return {"top": None, "norm": 1.0, "square": 2.0}[self.choice]

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        self.ranks(shape)  # of which it may complain
        return None, None

    @override
    def sizes(self, seen: Gradient) -> Tensor:
        return seen.row_norms()

    @override
    def map(self, state: Indices) -> LinearMap:
        return SelectionMap(state.left, state.right, (state.m, state.n))
