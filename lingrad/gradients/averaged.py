"""The gradient of which each process of a run has a part: of the batch, or of the weight."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Delegated, Gradient
from lingrad.gradients.local import DenseGradient
from lingrad.parallel import Processes


@final
class AveragedGradient(Delegated):
    """The mean over processes of their gradients, or the sum; every product costs one all-reduce of its result.

    Args:
        source: The gradient of this process, [m, n].
        processes: The processes.
    """

    def __init__(self, source: Gradient, processes: Processes) -> None:
        super().__init__(source)
        self.processes = processes

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    @override
    def T(self) -> AveragedGradient:
        return self._of(self.source.T)

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        return self.processes.reduce(self.source.product(left, right))

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> AveragedGradient:
        return self._of(self.source.select(rows, columns))

    @override
    def dense(self) -> Tensor:
        return self.processes.reduce(self.source.dense())

    @override
    def norm(self) -> Tensor:
        """Its norm, for which the whole matrix is all-reduced."""
        return DenseGradient(self.dense()).norm()

    @override
    def to(self, dtype: torch.dtype) -> AveragedGradient:
        return self._of(self.source.to(dtype))

    def _of(self, source: Gradient) -> AveragedGradient:
        return AveragedGradient(source, self.processes)


def averaged(local: Gradient, processes: Processes) -> Gradient:
    """The mean over processes of their gradients, or the sum; the gradient itself in one process."""
    return local if processes.count == 1 else AveragedGradient(local, processes)
