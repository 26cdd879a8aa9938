"""`full`: the identity map, full-rank training through the same engine; the baseline of every comparison."""

from __future__ import annotations

from typing import final

import torch
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.transforms.base import Ranks, Transform, When
from lingrad.transforms.registry import register
from lingrad.transforms.side import Sides


@register("full")
@final
class Full(Transform):
    """Coordinates are the weight's own entries; nothing is chosen and nothing is refreshed."""

    reads = "nothing"
    uncoded = "it has none"
    period = 0

    @override
    def ranks(self, shape: tuple[int, int]) -> Ranks:
        return None, None

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Sides:
        return Sides(None, None)

    @override
    def refresh(self, state: Sides, grad: Gradient | None, when: When) -> Sides:
        return state

    @override
    def map(self, state: Sides) -> LinearMap:
        return KroneckerMap(state.left, state.right)

    @override
    def due(self, step: int) -> bool:
        return False
