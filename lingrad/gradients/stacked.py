"""The gradients of several weights that act on one input, read as the gradient of one tall weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient, Transposed
from lingrad.gradients.local import DenseGradient


@final
class StackedGradient(Gradient):
    """Gradients [m_i, n] one under the other, [sum of m_i, n].

    Args:
        parts: The gradients, of one dtype and device.
    """

    def __init__(self, parts: Sequence[Gradient]) -> None:
        self.parts = tuple(parts)

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    @override
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    @override
    def T(self) -> Gradient:
        return Transposed(self)

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None:
            return torch.cat([part.product(None, right) for part in self.parts])
        blocks = left.split([part.shape[0] for part in self.parts])
        total, *others = (part.product(block, right) for part, block in zip(self.parts, blocks, strict=True))
        for other in others:
            total = total + other
        return total

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> Gradient:
        if rows is not None:
            return DenseGradient(self.dense()).select(rows, columns)
        return StackedGradient([part.select(None, columns) for part in self.parts])

    @override
    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts])

    @override
    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(torch.stack([part.norm() for part in self.parts]))
        return norm

    @override
    def row_norms(self) -> Tensor:
        return torch.cat([part.row_norms() for part in self.parts])

    @override
    def to(self, dtype: torch.dtype) -> StackedGradient:
        return StackedGradient([part.to(dtype) for part in self.parts])
