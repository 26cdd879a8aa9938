"""Gradients of one weight in one process: a matrix, or the two factors that a linear layer's backward has.

Layout: a weight is W [m, n] = [out, in], the order of ``torch.nn.Linear``, and its gradient G has the same shape. For a
linear layer y = x W^T that saw T tokens, G = dY^T X with dY [T, m] and X [T, n]: every product that a transform needs costs
O(T r (m + n)) from the two factors, and the m x n matrix need not exist.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient, Transposed
from lingrad.tensors import cast, nbytes, wide


@final
class DenseGradient(Gradient):
    """A gradient stored as a matrix.

    Args:
        matrix: G [m, n].
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    @override
    def nbytes(self) -> int:
        return nbytes(self.matrix)

    @property
    @override
    def T(self) -> DenseGradient:
        return DenseGradient(self.matrix.t())

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        result = self.matrix
        if left is not None:
            result = cast(left, self.dtype).t() @ result
        if right is not None:
            result = result @ cast(right, self.dtype)
        return result

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> DenseGradient:
        matrix = self.matrix if rows is None else self.matrix.index_select(0, rows)
        return DenseGradient(matrix if columns is None else matrix.index_select(1, columns))

    @override
    def dense(self) -> Tensor:
        return self.matrix

    @override
    def norm(self) -> Tensor:
        # the norm of the rows' norms (of the columns', if columns are contiguous): a single sum of so many squares in float32
        # is accurate to 1e-3 only
        along = int(self.matrix.stride(0) > self.matrix.stride(1))
        lines = torch.linalg.vector_norm(self.matrix, dim=along, dtype=wide(self.dtype))
        norm: Tensor = torch.linalg.vector_norm(lines)
        return norm

    @override
    def row_norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.matrix, dim=1, dtype=wide(self.dtype))
        return norms

    @override
    def to(self, dtype: torch.dtype) -> DenseGradient:
        return DenseGradient(self.matrix.to(dtype))


@final
class FactoredGradient(Gradient):
    """A gradient stored as its factors, G = out_grad^T @ input, both of which a linear layer's backward has.

    Args:
        out_grad: dY [T, m].
        input: X [T, n], same dtype.
    """

    def __init__(self, out_grad: Tensor, input: Tensor) -> None:  # noqa: A002 - torch's own name for a layer's input
        self.out_grad = out_grad
        self.input = input

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.out_grad.shape[1], self.input.shape[1]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.out_grad.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.out_grad.device

    @property
    @override
    def nbytes(self) -> int:
        return nbytes(self.out_grad, self.input)

    @property
    @override
    def T(self) -> FactoredGradient:
        return FactoredGradient(self.input, self.out_grad)

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        out_grad = self.out_grad if left is None else self.out_grad @ cast(left, self.dtype)
        return out_grad.t() @ (self.input if right is None else self.input @ cast(right, self.dtype))

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> FactoredGradient:
        out_grad = self.out_grad if rows is None else self.out_grad.index_select(1, rows)
        return FactoredGradient(out_grad, self.input if columns is None else self.input.index_select(1, columns))

    @override
    def dense(self) -> Tensor:
        return self.product(None, None)

    @override
    def norm(self) -> Tensor:
        """|dY^T X|_F, through the T x T Gram matrices when they are smaller than G itself."""
        if self.smaller_than_dense:
            rows, columns = (t.to(wide(self.dtype)) for t in (self.out_grad, self.input))
            # rounding can leave a tiny negative sum where the gradient vanishes
            return ((rows @ rows.t()) * (columns @ columns.t())).sum().clamp_min(0).sqrt()
        return DenseGradient(self.dense()).norm()

    @override
    def to(self, dtype: torch.dtype) -> FactoredGradient:
        return FactoredGradient(self.out_grad.to(dtype), self.input.to(dtype))

    @property
    def smaller_than_dense(self) -> bool:
        """Whether the two factors have fewer elements than the matrix."""
        m, n = self.shape
        return self.out_grad.shape[0] * (m + n) < m * n


@final
class RowsGradient(Gradient):
    """A gradient that is zero but in some adjacent rows: that of one of several fused matrices.

    Args:
        part: The gradient of these rows, [k, n].
        first: The first of them.
        rows: All rows, m.
    """

    def __init__(self, part: Gradient, first: int, rows: int) -> None:
        self.part, self.first, self.rows = part, first, rows

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.rows, self.part.shape[1]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.part.device

    @property
    @override
    def nbytes(self) -> int:
        return self.part.nbytes

    @property
    @override
    def T(self) -> Gradient:
        return Transposed(self)

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is not None:
            return self.part.product(left[self.own], right)
        found = self.part.product(None, right)
        return found.new_zeros(self.rows, found.shape[1]).index_copy_(0, self._indices(), found)

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> Gradient:
        if rows is not None:
            return DenseGradient(self.dense()).select(rows, columns)
        return RowsGradient(self.part.select(None, columns), self.first, self.rows)

    @override
    def dense(self) -> Tensor:
        return self.product(None, None)

    @override
    def norm(self) -> Tensor:
        return self.part.norm()

    @override
    def row_norms(self) -> Tensor:
        norms = self.part.row_norms()
        return norms.new_zeros(self.rows).index_copy_(0, self._indices(), norms)

    @override
    def to(self, dtype: torch.dtype) -> RowsGradient:
        return RowsGradient(self.part.to(dtype), self.first, self.rows)

    @property
    def own(self) -> slice:
        """The rows that may not be zero."""
        return slice(self.first, self.first + self.part.shape[0])

    def _indices(self) -> Tensor:
        return torch.arange(self.own.start, self.own.stop, device=self.device)


def accumulate(total: Gradient | None, part: Gradient) -> Gradient:
    """Add the gradient of one more micro-batch, in the form that takes less memory.

    Args:
        total: The sum so far; may be written into. None at the first micro-batch.
        part: The gradient to add, [m, n].

    Returns:
        The sum: factored while the factors are smaller than the matrix, dense from then on.
    """
    if total is None:
        if isinstance(part, RowsGradient):
            return DenseGradient(part.dense())
        if isinstance(part, FactoredGradient) and not part.smaller_than_dense:
            return DenseGradient(formed(part))
        return part
    if isinstance(total, FactoredGradient) and isinstance(part, FactoredGradient):
        joined = FactoredGradient(torch.cat((total.out_grad, part.out_grad)), torch.cat((total.input, part.input)))
        if joined.smaller_than_dense:
            return joined
    matrix = formed(total)
    if isinstance(part, FactoredGradient):
        part = part.to(matrix.dtype)
        matrix.addmm_(part.out_grad.t(), part.input)
    elif isinstance(part, RowsGradient):
        matrix[part.own].add_(part.part.dense())
    else:
        matrix.add_(part.dense())
    return DenseGradient(matrix)


def formed(grad: Gradient) -> Tensor:
    """The matrix, [m, n]; of float16 factors in float32, since its entries may overflow where its projection does not."""
    half = isinstance(grad, FactoredGradient) and grad.dtype == torch.float16
    return (grad.to(torch.float32) if half else grad).dense()
