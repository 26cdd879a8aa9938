"""Linear weights that are held in 4 or 8 bits: read as a matrix, written back, decayed, in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class MergeLoss(NamedTuple):
    """What merges into a quantised weight have lost: W + S z that is to be quantised again is rounded.

    Args:
        merges: How many there were.
        last: |what is lost|_F / |S z|_F of the last one; what was kept in the new coordinates is not lost.
        total: The same of all, by sums of squares.
        lost_squares: The sum of what is lost.
        changed_squares: The sum of what was merged.
    """

    merges: int = 0
    last: float = 0.0
    total: float = 0.0
    lost_squares: float = 0.0
    changed_squares: float = 0.0

    def plus(self, lost: float, changed: float) -> MergeLoss:
        """One more merge, of a change of norm ``changed``."""
        a, b = self.lost_squares + lost**2, self.changed_squares + changed**2
        return MergeLoss(self.merges + 1, lost / changed, (a / b) ** 0.5, a, b)


class Packed(ABC):
    """The quantised weight of one layer.

    Args:
        module: The layer.
        name: The weight's name, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        self.name = name

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is held in: ``nf4``, ``fp4`` or ``int8``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype it was quantised from."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight [m, n], a new tensor in float32."""

    @abstractmethod
    def write(self, matrix: Tensor) -> None:
        """Quantise a matrix [m, n], float32, into the memory of the weight."""

    @abstractmethod
    def scales(self) -> list[Tensor]:
        """What a factor of the weight is a factor of."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that make the weight, by name; who writes into all of them has set it."""

    @abstractmethod
    def entries(self, matrix: Tensor) -> dict[str, Tensor]:
        """What the layer's ``state_dict`` would hold if the weight were a matrix [m, n], float32: key -> tensor."""

    @abstractmethod
    def take(self, entries: dict[str, Any]) -> list[str]:
        """Take over entries of a ``state_dict``, which bitsandbytes itself cannot load into a layer that is quantised.

        Args:
            entries: Key, without the layer's prefix, -> tensor.

        Returns:
            The keys that are done with; ``weight`` is left to torch.
        """

    def tensors(self) -> list[Tensor]:
        """All tensors in memory, code books included."""
        return list(self.state().values())

    def open(self) -> Any:
        """Have the weight stay in the layout it is trained in.

        Returns:
            What `close` needs.
        """
        return None

    def close(self, opened: Any) -> None:  # noqa: B027 - nothing to undo in most
        """Undo `open`."""
