"""Small things about tensors: a shape and a dtype without the numbers, storages, casts."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
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


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes its time to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to factorise or sum in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of some tensors; memory that two of them share counts twice."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def storage(tensor: Tensor) -> int:
    """What is equal for tensors that share their memory, and differs for others while they are alive."""
    key: int = tensor.untyped_storage()._cdata
    return key


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for each storage, empty ones left out; of several that share one the last, in the order of the first."""
    return list({storage(tensor): tensor for tensor in tensors if tensor.numel()}.values())
