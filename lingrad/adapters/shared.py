"""An input that several layers read, reduced once for all of them."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from lingrad.maps import LinearMap


class _Reduced(NamedTuple):
    """An input that several layers read, reduced once."""

    given: weakref.ref[Tensor]
    version: int
    map: LinearMap
    reduced: Tensor
    waiting: set[str]  # layers that have not asked for it yet

    def matches(self, layer: str, current: LinearMap, x: Tensor, given: Tensor) -> bool:
        """Whether this is the same input, and the layer has not had it."""
        same = self.given() is given and self.version == given._version and self.map is current
        return same and layer in self.waiting and self.reduced.dtype == x.dtype


class SharedInput:
    """What layers with one right basis Q share in a forward: X Q, computed for the first of them that reads X.

    Args:
        layers: The names of their weights.
    """

    def __init__(self, layers: set[str]) -> None:
        self._layers = layers
        self._last: _Reduced | None = None

    def reduce(self, layer: str, current: LinearMap, x: Tensor, given: Tensor) -> Tensor:
        """All that the map needs of an input.

        Args:
            layer: The name of the weight that reads it.
            current: The map.
            x: The input, [..., n].
            given: The input in the dtype it was given in.

        Returns:
            ``current.reduce(x)``.
        """
        if given.is_inference():
            return current.reduce(x)
        last = self._last
        if last is None or not last.matches(layer, current, x, given):
            last = _Reduced(weakref.ref(given), given._version, current, current.reduce(x), self._layers - {layer})
        last.waiting.discard(layer)
        self._last = last if last.waiting else None
        return last.reduced

    def forget(self) -> None:
        """Free what not all layers have asked for."""
        self._last = None
