"""The base optimizer's state of one weight's coordinates, and how a refresh carries it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.config.settings import Carry
from lingrad.errors import DualityError
from lingrad.maps import LinearMap
from lingrad.optimizers.eight_bit import Quantizer
from lingrad.tensors import whole


class Moments(NamedTuple):
    """The base optimizer's state of one weight's coordinates, and how a refresh carries it over.

    Args:
        state: Its entries; changed in place.
        carry: ``keep`` (GaLore), ``reset`` (as ReLoRA does), or ``rotate`` into the new basis.
        degrees: For ``rotate``, which entries are means (1) and which are squares (2).
        initial: Gives the entries a base has before its first step; most have none.
        quantizer: How the entries are stored between steps, where they are quantised.
    """

    state: dict[str, Any]
    carry: Carry
    degrees: Mapping[str, int]
    initial: Callable[[], Mapping[str, Any]]
    quantizer: Quantizer | None = None

    def rotated(
        self, old: LinearMap, new: LinearMap, name: str, shape: torch.Size, placed: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """The moments in the coordinates of another map, where they are to be rotated.

        Args:
            old: The map they belong to.
            new: The map to come.
            name: The weight's name, for messages.
            shape: The shape of the coordinates.
            placed: Gives a moment, which every process has, as the coordinates are held.

        Returns:
            Key -> moment; empty unless ``carry`` is ``rotate``.

        Raises:
            DualityError: An entry is no moment, so that it cannot be rotated.
        """
        carried: dict[str, Tensor] = {}
        if self.carry != "rotate":
            return carried
        entries = self.state if self.quantizer is None else self.quantizer.decode(self.state)
        for key, value in entries.items():
            if not isinstance(value, Tensor) or (key not in self.degrees and value.numel() == 1):  # a step counter
                continue
            if key not in self.degrees or value.shape != shape:
                raise DualityError(f"carry='rotate' cannot rotate the state '{key}' of {name}; use keep or reset")
            moment = whole(value)
            moved = new.transport(old, moment) if self.degrees[key] == 1 else new.transport_squares(old, moment)
            carried[key] = placed(moved)
        return carried

    def replace(self, carried: Mapping[str, Tensor]) -> None:
        """Move over to the new basis: take over what `rotated` gave, or start again where ``carry`` is ``reset``.

        Args:
            carried: Key -> moment.
        """
        if self.carry == "reset":
            self.state.clear()
            self.state.update(self.initial())
        held = carried if self.quantizer is None else self.quantizer.encode(carried)
        for key, value in held.items():
            self.state[key].copy_(value)
