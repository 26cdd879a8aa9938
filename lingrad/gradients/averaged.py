"""The mean over processes of a gradient of which each has its part."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.gradients.local import DenseGradient
from lingrad.parallel import average, ranks


@final
class AveragedGradient(Gradient):
    """The mean over ranks of a gradient of which each has its part; every product costs one all-reduce of its result.

    Args:
        local: This rank's part, [m, n].
    """

    def __init__(self, local: Gradient) -> None:
        self.local = local

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.local.shape

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.local.device

    @property
    @override
    def nbytes(self) -> int:
        return self.local.nbytes

    @property
    @override
    def T(self) -> AveragedGradient:
        return AveragedGradient(self.local.T)

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        return average(self.local.product(left, right))

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> AveragedGradient:
        return AveragedGradient(self.local.select(rows, columns))

    @override
    def dense(self) -> Tensor:
        return average(self.local.dense())

    @override
    def norm(self) -> Tensor:
        """The norm of the mean, for which the whole matrix is all-reduced."""
        return DenseGradient(self.dense()).norm()

    @override
    def to(self, dtype: torch.dtype) -> AveragedGradient:
        return AveragedGradient(self.local.to(dtype))


def averaged(local: Gradient) -> Gradient:
    """The mean over ranks of a gradient; the gradient itself in one process."""
    return local if ranks() == 1 else AveragedGradient(local)
