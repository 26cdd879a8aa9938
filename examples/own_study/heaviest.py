"""A transform of one's own: the coordinates of a weight that its gradient is largest in, chosen by sums of magnitudes."""

import torch
from torch import Tensor

from lingrad import Gradient, SideTransform, register
from lingrad.transforms import When


@register("heaviest")
class Heaviest(SideTransform):
    """The unit vectors of the ``rank`` rows (or columns) with the largest sum of magnitudes."""

    every: int = 20

    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        """Choose among the rows of ``seen``: those of the weight for a left basis, its columns for a right one."""
        chosen = seen.dense().abs().sum(1).topk(old.shape[1]).indices.sort().values
        return torch.nn.functional.one_hot(chosen, old.shape[0]).t().to(old.dtype)
