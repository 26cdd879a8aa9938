"""A weight in 4 or 8 bits as a run uses it: dequantised, changed and quantised again at every merge.

What is smaller than half a step of the grid is lost, and the loss of every merge is measured. What lies in the span of a new
basis can be kept in its coordinates (Loeschcke, Toftrup, Kastoryano, Belongie, Snaebjarnarson, "LoQT: Low-Rank Adapters for
Quantized Pretraining", NeurIPS 2024, arXiv 2405.16528, section 3, error compensation).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import ModeError
from lingrad.maps import LinearMap
from lingrad.weights.base import MergeLoss, Remainder, Weight
from lingrad.weights.layout import layout_of
from lingrad.weights.rounding import Rounding


class PackedWeight(Weight):
    """The quantised weight of one layer.

    Args:
        module: The layer.
        name: The weight's name, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        self.name = name
        super().__init__(layout_of(self.param, module, name))
        self.loss = MergeLoss()

    @property
    @override
    def param(self) -> nn.Parameter:
        weight: nn.Parameter = self._weight
        return weight

    @property
    def _weight(self) -> Any:
        return self.module.weight

    @property
    @abstractmethod
    def kind(self) -> str:
        """How it is stored: ``nf4``, ``fp4`` or ``int8``."""

    @abstractmethod
    def write(self, matrix: Tensor) -> None:
        """Quantise a matrix [m, n], float32, into the memory of the weight."""

    def require_rounding(self) -> None:
        """Make sure that it can be rounded in another way than to the nearest.

        Raises:
            ModeError: The grid of its codes is not even.
        """
        raise ModeError(f"{self.name} is stored as {self.kind}, which is rounded to the nearest code only; leave rounding out")

    def write_rounded(self, matrix: Tensor, rounding: Rounding) -> None:
        """Quantise a matrix with a rounding that is not to the nearest.

        Args:
            matrix: [m, n], float32, without what the rounding keeps of it; overwritten.
            rounding: The rounding. Raises the error of `require_rounding`.
        """
        self.require_rounding()

    @abstractmethod
    def entries(self, matrix: Tensor) -> dict[str, Tensor]:
        """What the layer's ``state_dict`` would hold if the weight were a matrix [m, n], float32: key -> tensor."""

    @abstractmethod
    def take(self, entries: dict[str, Any]) -> list[str]:
        """Take over entries of a ``state_dict``, which bitsandbytes itself cannot load into a layer that is quantised.

        Args:
            entries: Key, without the layer's prefix, -> tensor.

        Returns:
            The keys that need no further handling; ``weight`` is left to torch.
        """

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors that make the weight: codes, scales."""

    @override
    def add_(self, current: LinearMap, coords: Tensor) -> Remainder | None:
        lift = current.lift(coords.detach().float())
        if self.rounding is not None:  # what is not in the weight is not lost, by chance or because it is kept
            self.write_rounded(lift.add_(self.dense()), self.rounding)
            return None
        wanted = self.dense().add_(lift)
        changed = float(torch.linalg.vector_norm(lift))
        self.write(wanted)
        return Remainder(wanted.sub_(self.dense()), changed)

    @override
    def tensors(self) -> list[Tensor]:
        return list(self.parts().values())

    @override
    def state(self) -> dict[str, Tensor]:
        return {f"weight.{key}": value for key, value in self.parts().items()}

    def open(self) -> Any:
        """Have the weight stay in the layout it is trained in.

        Returns:
            What `close` needs.
        """
        return None

    def close(self, opened: Any) -> None:
        """Undo `open`."""
