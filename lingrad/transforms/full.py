"""`full`: the identity map, full-rank training through the same engine; the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.tensors import TensorSpec
from lingrad.transforms.base import Reads, Transform, When
from lingrad.transforms.registry import register
from lingrad.transforms.side import Bases


@register("full")
@final
@dataclass(frozen=True, kw_only=True)
class Full(Transform):
    """Coordinates are the weight's own entries; nothing is chosen and nothing is refreshed."""

    @override
    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[None, None]:
        return None, None

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        return []

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Bases:
        return Bases(None, None)

    @override
    def refresh(self, state: Bases, grad: Gradient | None, when: When) -> Bases:
        return state

    @override
    def map(self, state: Bases) -> LinearMap:
        return KroneckerMap(state.left, state.right)

    @property
    @override
    def reads(self) -> Reads:
        return "nothing"

    @property
    @override
    def period(self) -> int:
        return 0

    @override
    def due(self, step: int) -> bool:
        return False
