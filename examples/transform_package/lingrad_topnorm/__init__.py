"""A transform in one file: keep the rows (or columns) of the weight whose gradients are largest.

This is the deterministic variant of Grass (Muhamed et al., 2024, arXiv 2406.17660). The basis is a choice of unit vectors, so
the coordinates are entries of the weight itself. Once this package is installed, ``topnorm(rank=64)`` works in every config
string.
"""

from dataclasses import dataclass
from typing import final

import torch

import lingrad
from lingrad import Gradient, GradientBasis
from lingrad.transforms import Bases, When


@lingrad.register("topnorm")
@final
@dataclass(frozen=True, kw_only=True)
class TopNorm(GradientBasis):
    """The unit vectors of the ``rank`` rows (or columns) with the largest gradient norm.

    Args:
        power: Rows are ranked by their p-norm; 2 is the Euclidean length.
    """

    power: float = 2.0

    def bases(self, grad: Gradient, old: Bases, when: When) -> Bases:
        """Choose rows for a left basis, columns for a right one; a side without a basis stays None."""
        matrix = grad.dense()
        return Bases(self._choose(matrix, old.left), self._choose(matrix.t(), old.right))

    def _choose(self, matrix: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor | None:
        if old is None:
            return None
        norms = torch.linalg.vector_norm(matrix, ord=self.power, dim=1)
        rows = norms.topk(old.shape[1]).indices.sort().values
        return torch.nn.functional.one_hot(rows, len(matrix)).t().to(old.dtype)
