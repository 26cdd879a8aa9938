"""The gradient of a weight: a matrix that is known by its products.

Layout: a weight is W [m, n] = [out, in], the order of ``torch.nn.Linear``, and its gradient G has the same shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.tensors import wide

ROWS = 512  # that are formed at a time where all are read one after the other


class Gradient(ABC):
    """A matrix G [m, n] that is defined by its products; it need not be formed.

    Laws, for any ``left`` [m, p] and ``right`` [n, q]:

    - ``product(left, right) == left.T @ dense() @ right``, a missing factor meaning the identity;
    - ``T.dense() == dense().T`` and ``norm() == |dense()|_F``;
    - ``select(rows, columns).dense() == dense()[rows][:, columns]``.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the weight matrix."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the factors or of the matrix."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors that this object keeps alive."""

    @property
    @abstractmethod
    def T(self) -> Gradient:  # noqa: N802 - the name torch and numpy give a transpose
        """The transpose, [n, m]; shares memory."""

    @abstractmethod
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Both-sided product ``left.T @ G @ right``.

        Args:
            left: [m, p], or None for the identity.
            right: [n, q], or None for the identity.

        Returns:
            [p, q], in the gradient's dtype.
        """

    @abstractmethod
    def select(self, rows: Tensor | None, columns: Tensor | None) -> Gradient:
        """Restrict G to some rows and columns.

        Args:
            rows: int64 indices [p] into m, or None for all.
            columns: int64 indices [q] into n, or None for all.

        Returns:
            The gradient ``G[rows][:, columns]``, [p, q].
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix itself, [m, n]; formed if it is not stored."""

    @abstractmethod
    def norm(self) -> Tensor:
        """The Frobenius norm, a 0-d tensor in at least float32."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Gradient:
        """The same gradient with its products computed in ``dtype``."""

    def row_norms(self) -> Tensor:
        """The norms of the rows, [m], in at least float32; by some rows of the matrix after the other."""
        m, blocks = self.shape[0], []
        for start in range(0, m, ROWS):
            rows = torch.arange(start, min(start + ROWS, m), device=self.device)
            blocks.append(torch.linalg.vector_norm(self.select(rows, None).dense(), dim=1, dtype=wide(self.dtype)))
        return torch.cat(blocks)

    def matmul(self, right: Tensor) -> Tensor:
        """``G @ right``: [n, q] -> [m, q]."""
        return self.product(None, right)

    def rmatmul(self, left: Tensor) -> Tensor:
        """``left.T @ G``: [m, p] -> [p, n]."""
        return self.product(left, None)


class Delegated(Gradient):
    """A gradient that is computed from another one: its dtype, its device and its bytes.

    Args:
        source: The other gradient.
    """

    def __init__(self, source: Gradient) -> None:
        self.source = source

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self.source.device

    @property
    @override
    def nbytes(self) -> int:
        return self.source.nbytes


@final
class Transposed(Delegated):
    """The transpose of a gradient, computed from the gradient's own products."""

    @property
    @override
    def shape(self) -> tuple[int, int]:
        m, n = self.source.shape
        return n, m

    @property
    @override
    def T(self) -> Gradient:
        return self.source

    @override
    def product(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        return self.source.product(right, left).t()

    @override
    def select(self, rows: Tensor | None, columns: Tensor | None) -> Gradient:
        return self.source.select(columns, rows).T

    @override
    def dense(self) -> Tensor:
        return self.source.dense().t()

    @override
    def norm(self) -> Tensor:
        return self.source.norm()

    @override
    def to(self, dtype: torch.dtype) -> Gradient:
        return Transposed(self.source.to(dtype))
