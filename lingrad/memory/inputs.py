"""The loss of a run whose memory is looked at, on random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import DataError, LingradError, MemoryModelError, in_short
from lingrad.memory import kernels
from lingrad.models import loss_of, make_inputs


class OwnLoss:
    """The loss that a model of transformers computes on random inputs, or the mean of its first output.

    Args:
        batch: Rows of a batch.
        length: Positions of a row.
        remedy: What to do where no inputs are known, for the message.
    """

    def __init__(self, batch: int, length: int, remedy: str = "give a function that computes its loss: loss=...") -> None:
        self.batch, self.length, self.remedy = batch, length, remedy
        self._device = torch.device("meta")
        self._inputs: dict[str, Any] = {}  # argument -> True, or the shape, dtype and bound of a tensor

    def prepare(self, model: nn.Module) -> None:
        """Find the inputs before anything is counted, since a model may be run to find them.

        Args:
            model: The model, on the device it is to run on.

        Raises:
            MemoryModelError: None are known.
        """
        try:
            found = make_inputs(model, rows=self.batch, length=self.length, loss=True)
        except DataError as error:
            raise MemoryModelError(f"{error}; {self.remedy}") from error
        self._device = next(model.parameters()).device
        self._inputs = {name: _described(value) if isinstance(value, Tensor) else value for name, value in found.items()}

    def __call__(self, model: nn.Module) -> Tensor:
        """The loss of a step; its inputs are made in it, as by a data loader, those that are alike once."""
        made: dict[Any, Tensor] = {}
        for described in self._inputs.values():
            if described is not True and described not in made:
                shape, dtype, bound = described
                options: Any = {"dtype": dtype, "device": self._device}
                made[described] = torch.randint(bound, shape, **options) if bound else torch.randn(shape, **options)
        try:
            return loss_of(model(**{name: made.get(described, True) for name, described in self._inputs.items()}))
        except (LingradError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model may raise any exception
            if kernels.of_meta(error):
                raise
            raise MemoryModelError(
                f"{type(model).__name__} does not run on the random {', '.join(self._inputs)} that are made for it: "
                f"{in_short(error)}; {self.remedy}"
            ) from error


def _described(value: Tensor) -> tuple[tuple[int, ...], torch.dtype, int]:
    whole = not value.is_floating_point()
    return tuple(value.shape), value.dtype, (2 if value.is_meta else int(value.max()) + 1) if whole else 0
