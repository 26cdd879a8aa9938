"""Bases that select rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.maps.base import LinearMap, as_gradient
from lingrad.maps.factors import Factors


@final
@dataclass(frozen=True, eq=False)
class SelectionMap(LinearMap):
    """Coordinates are entries of the weight: ``lift`` scatters them to some rows and columns, ``project`` gathers.

    Args:
        rows: int64 indices [p] into m, without repeats, or None for all rows.
        columns: int64 indices [q] into n, without repeats, or None for all columns.
        shape: (m, n), the weight's shape.
    """

    rows: Tensor | None
    columns: Tensor | None
    shape: tuple[int, int]

    @override
    def lift(self, coords: Tensor) -> Tensor:
        m, n = self.shape
        if self.columns is not None:
            coords = coords.new_zeros(len(coords), n).index_copy(1, self.columns, coords)
        if self.rows is not None:
            coords = coords.new_zeros(m, coords.shape[1]).index_copy(0, self.rows, coords)
        return coords

    @override
    def factors(self, coords: Tensor) -> Factors:
        if self.rows is not None:
            chosen = coords.new_zeros(self.shape[0], len(self.rows))
            chosen[self.rows, torch.arange(len(self.rows), device=chosen.device)] = 1.0
            return Factors(chosen, SelectionMap(None, self.columns, (len(self.rows), self.shape[1])).lift(coords))
        flipped = self.T.factors(coords.t()) if self.columns is not None else super().factors(coords).T
        return flipped.T

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        return as_gradient(grad).select(self.rows, self.columns).dense()

    @property
    @override
    def T(self) -> SelectionMap:
        return SelectionMap(self.columns, self.rows, self.shape[::-1])

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.rows, self.columns) if t is not None)

    @property
    @override
    def aligned(self) -> bool:
        return self.rows is None

    @override
    def part(self, rows: slice, coords: Tensor) -> tuple[SelectionMap, Tensor]:
        shape = (rows.stop - rows.start, self.shape[1])
        if self.rows is None:
            return SelectionMap(None, self.columns, shape), coords
        found = ((self.rows >= rows.start) & (self.rows < rows.stop)).nonzero().flatten()
        return SelectionMap(self.rows[found] - rows.start, self.columns, shape), coords[found]

    @property
    @override
    def inner(self) -> SelectionMap:
        columns = self.shape[1] if self.columns is None else len(self.columns)
        return SelectionMap(self.rows, None, (self.shape[0], columns))

    @override
    def reduce(self, x: Tensor) -> Tensor:
        return x if self.columns is None else x.index_select(-1, self.columns)

    @override
    def expand(self, y: Tensor) -> Tensor:
        return y if self.rows is None else y.new_zeros(*y.shape[:-1], self.shape[0]).index_copy(-1, self.rows, y)

    @override
    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.expand(self.reduce(x) @ coords.to(x.dtype).t())

    @override
    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        chosen = [(side, indices) for side, indices in enumerate((self.rows, self.columns)) if indices is not None]
        if len(chosen) != 1:
            weight.add_(self.lift(coords))
        elif coords.dtype == weight.dtype:
            weight.index_add_(*chosen[0], coords)
        else:  # summed in the wider dtype and rounded once
            weight.index_copy_(*chosen[0], weight.index_select(*chosen[0]).add_(coords))

    @override
    def residual(self, matrix: Tensor) -> Tensor:
        return matrix - self.lift(self.project(matrix))

    @override
    def norm(self, coords: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(coords)
        return norm

    @override
    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        if not isinstance(old, SelectionMap):
            return super().transport_squares(old, squares)
        return self.project(old.lift(squares))  # S^T S_old is a 0-1 matrix, its own square
