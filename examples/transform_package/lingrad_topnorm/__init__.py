"""A transform in one file: keep the rows (or columns) of the weight whose gradients are largest.

This is the deterministic variant of Grass (Muhamed et al., 2024, arXiv 2406.17660). The basis is a choice of unit vectors, so
the coordinates are entries of the weight itself. Once this package is installed, ``topnorm(rank=64)`` works in every config
string.
"""

import torch
from torch import Tensor

from lingrad import Gradient, SideTransform, register
from lingrad.transforms import When


@register("topnorm")
class TopNorm(SideTransform):
    """The unit vectors of the ``rank`` rows (or columns) with the largest gradient norm.

    Args:
        power: Rows are ranked by their p-norm; 2 is the Euclidean length.
    """

    power: float = 2.0

    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        """Choose among the rows of ``seen``: those of the weight for a left basis, its columns for a right one."""
        norms = torch.linalg.vector_norm(seen.dense(), ord=self.power, dim=1)
        rows = norms.topk(old.shape[1]).indices.sort().values
        return torch.nn.functional.one_hot(rows, len(norms)).t().to(old.dtype)
