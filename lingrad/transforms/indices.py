"""Transforms that choose some of a fixed set of columns on each side, and store their indices alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.errors import SpecError
from lingrad.gradients.base import Gradient
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms.base import When
from lingrad.transforms.linalg import choose_by_size, derive_seed, some_of
from lingrad.transforms.side import BasisTransform


class Indices(NamedTuple):
    """State of a transform that chooses columns of a fixed set.

    Args:
        m: Rows of the weight.
        n: Columns of the weight.
        left: int64 [p], ascending, the columns that make the left basis; None if that side has none.
        right: int64 [q], of the right basis.
        like: Empty, with the device and dtype of the bases.
    """

    m: int
    n: int
    left: Tensor | None
    right: Tensor | None
    like: Tensor

    @property
    def fixed(self) -> tuple[str, ...]:
        """The fields that a checkpoint must agree on: they are sizes of memory."""
        return ("m", "n")


@dataclass(frozen=True, kw_only=True)
class IndexTransform(BasisTransform):
    """A transform that chooses the columns of its bases by a size that the gradient gives each; a subclass defines `sizes`."""

    uncoded = "its state is indices, which are few numbers already"

    @property
    def power(self) -> float | None:
        """The power of a size that the probability of a column is proportional to; None takes the largest."""
        return None

    @abstractmethod
    def sizes(self, seen: Gradient) -> Tensor:
        """What each column of one side would capture of the gradient.

        Args:
            seen: [size, k], in at least float32: G [m, n] for the left side, its transpose for the right one.

        Returns:
            [size], not negative.
        """

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        indices = [TensorSpec((rank,), torch.int64) for rank in self.ranks(shape) if rank is not None]
        return [*indices, *super().storage(shape, dtype)]

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Indices:
        left, right = (
            None if rank is None else some_of(size, rank, seed=derive_seed(seed, side), device=device)
            for side, size, rank in zip(("left", "right"), shape, self.ranks(shape), strict=True)
        )
        return Indices(*shape, left, right, torch.empty(0, device=device, dtype=dtype))

    @override
    def refresh(self, state: Indices, grad: Gradient | None, when: When) -> Indices:
        if grad is None:
            raise SpecError(f"{self.name} reads a {self.reads}; it cannot be refreshed without one")
        grad = grad.to(wide(grad.dtype))
        left, right = (
            None if old is None else self._chosen(seen, len(old), derive_seed(when.seed, when.step, side))
            for side, seen, old in (("left", grad, state.left), ("right", grad.T, state.right))
        )
        return state._replace(left=left, right=right)

    def _chosen(self, seen: Gradient, count: int, seed: int) -> Tensor:
        sizes = self.sizes(seen)
        floor = sizes.max() * max(seen.shape) * torch.finfo(sizes.dtype).eps
        return choose_by_size(sizes, count, floor=floor, power=self.power, seed=seed)
