"""Tensors as the memory ledger counts them: by shape and dtype alone."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch


class Stored(NamedTuple):
    """A tensor that stays in memory.

    Args:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize
