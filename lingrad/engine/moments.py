"""The base optimizer's state of one weight's coordinates, and how a refresh carries it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.config.settings import MOVES, Carry, Settings
from lingrad.errors import DualityError
from lingrad.maps import LinearMap
from lingrad.optimizers import Base
from lingrad.optimizers.eight_bit import Quantizer
from lingrad.optimizers.moments import MomentKinds, moment_kinds, require_transportable
from lingrad.tensors import whole


class Moments(NamedTuple):
    """The base optimizer's state of one weight's coordinates, and how a refresh carries it over.

    Args:
        state: Its entries; changed in place.
        carry: ``keep`` (GaLore), ``reset`` (as ReLoRA does), ``rotate`` into the new basis, or ``transport`` (LDAdam). All but
            ``reset`` leave the count of steps, on which the bias correction depends, as it is.
        kinds: For ``rotate`` and ``transport``, which entries are means and which are squares.
        rates: For ``transport``, how fast the means forget.
        initial: Gives the entries a base has before its first step; most have none.
        quantizer: How the entries are stored between steps, where they are quantised.
    """

    state: dict[str, Any]
    carry: Carry
    kinds: MomentKinds
    rates: Callable[[], Mapping[str, float]]
    initial: Callable[[], Mapping[str, Any]]
    quantizer: Quantizer | None = None

    def carried(
        self, old: LinearMap, new: LinearMap, name: str, shape: torch.Size, placed: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """The moments in the coordinates of another map, where they are to be taken there.

        With C = S_new^T S_old, a mean m of gradients becomes C m, exactly. A mean v of squares cannot be known. ``rotate``
        takes (C o C) v, as if gradients had no mean. ``transport`` takes variance and mean apart (Robert et al., LDAdam,
        ICLR 2025, arXiv 2410.16103, section 3.2): with m' and v' for m and v after bias correction by their weights,
        |(C o C) (v' - m'^2) + (C m')^2|, times the weight of v.

        Args:
            old: The map they belong to.
            new: The map to come.
            name: The weight's name, for messages.
            shape: The shape of the coordinates.
            placed: Gives a moment, which every process has, as the coordinates are held.

        Returns:
            Key -> moment; empty where ``carry`` is ``keep`` or ``reset``.

        Raises:
            DualityError: An entry is no moment, so that it cannot be carried.
        """
        if self.carry not in MOVES or not self.state:
            return {}
        degrees = self.kinds.degrees
        found: dict[str, Tensor] = {}
        for key, value in (self.state if self.quantizer is None else self.quantizer.decode(self.state)).items():
            if not isinstance(value, Tensor) or (key not in degrees and value.numel() == 1):  # a step counter
                continue
            if key not in degrees or value.shape != shape:
                raise DualityError(f"carry='{self.carry}' cannot {self.carry} the state '{key}' of {name}; use keep or reset")
            found[key] = whole(value)
        means = {key: new.transport(old, value) for key, value in found.items() if degrees[key] == 1}
        rates = self.rates() if self.carry == "transport" else {}
        mean = next((key for key in means if key in rates), None)
        moved = dict(means)
        for key in found.keys() - means.keys():
            if mean is None or key not in rates:
                moved[key] = new.transport_squares(old, found[key])
                continue
            of_mean, of_square = self._weight(rates[mean]), self._weight(rates[key])
            variance = found[key] / of_square - (found[mean] / of_mean).square()
            estimate = new.transport_squares(old, variance) + (means[mean] / of_mean).square()
            moved[key] = estimate.abs_().mul_(of_square)
        return {key: placed(moved[key]) for key in found}

    def mean(self) -> tuple[str, float, Tensor] | None:
        """The mean of gradients: its key, how fast it forgets, and its value; None where there is none."""
        rates = self.rates() if self.state else {}
        key = next((key for key in self.state if self.kinds.degrees.get(key) == 1 and key in rates), None)
        if key is None:
            return None
        entries = self.state if self.quantizer is None else self.quantizer.decode(self.state)
        return key, rates[key], whole(entries[key])

    def _weight(self, rate: float) -> Tensor:
        """1 - b^k, the weights in a mean of k gradients, 0-d; not zero."""
        count = self.state[self.kinds.counter or ""]
        count = count.double() if isinstance(count, Tensor) else torch.tensor(float(count), dtype=torch.float64)
        return (1.0 - rate**count).clamp_min(torch.finfo(torch.float32).tiny)

    def replace(self, carried: Mapping[str, Tensor]) -> None:
        """Move over to the new basis: take over what `carried` gave, or start again where ``carry`` is ``reset``.

        Args:
            carried: Key -> moment.
        """
        if self.carry == "reset":
            self.state.clear()
            self.state.update(self.initial())
        held = carried if self.quantizer is None else self.quantizer.encode(carried)
        for key, value in held.items():
            self.state[key].copy_(value)


def known_kinds(base: Base, settings: Settings) -> MomentKinds:
    """What a run must know of its base's state.

    Args:
        base: The base of the coordinates.
        settings: The options of the run.

    Returns:
        The kinds; none where nothing asks for them.

    Raises:
        DualityError: An entry of the state is none that the options could carry.
    """
    if settings.carry in MOVES:
        kinds = moment_kinds(base, f"carry='{settings.carry}'", settings.carry)
        if settings.carry == "transport":
            require_transportable(base, kinds)
        return kinds
    if settings.residual == "feedback":
        return moment_kinds(base, "residual='feedback'", "follow")
    return MomentKinds({}, None)
