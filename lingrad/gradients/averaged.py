"""The mean of a gradient over the processes of a run."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Delegated, Gradient
from lingrad.gradients.local import DenseGradient
from lingrad.parallel import average, ranks


@final
class AveragedGradient(Delegated):
    """The mean over ranks of their gradients; every product costs one all-reduce of its result.

    Args:
        source: The gradient of this rank, [m, n].
    """

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    @override
    def T(self) -> AveragedGradient:
        return AveragedGradient(self.source.T)

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        return average(self.source.product(left, right))

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> AveragedGradient:
        return AveragedGradient(self.source.select(rows, columns))

    @override
    def dense(self) -> Tensor:
        return average(self.source.dense())

    @override
    def norm(self) -> Tensor:
        """The norm of the mean, for which the whole matrix is all-reduced."""
        return DenseGradient(self.dense()).norm()

    @override
    def to(self, dtype: torch.dtype) -> AveragedGradient:
        return AveragedGradient(self.source.to(dtype))


def averaged(local: Gradient) -> Gradient:
    """The mean over ranks of their gradients; the gradient itself in one process."""
    return local if ranks() == 1 else AveragedGradient(local)
