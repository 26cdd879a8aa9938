"""`kron`: a left basis chosen by one transform and a right basis by another, S z = P z Q^T."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, final, get_args

import torch
from typing_extensions import override

from lingrad.errors import SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.maps import LinearMap, two_sided
from lingrad.tensors import TensorSpec
from lingrad.transforms.base import Probe, Reads, Sketch, Transform, When
from lingrad.transforms.registry import register
from lingrad.transforms.side import BasisTransform


class Pair(NamedTuple):
    """State of `Kron`: the states of its two sides."""

    left: Any
    right: Any


@register("kron")
@final
@dataclass(frozen=True, kw_only=True)
class Kron(Transform):
    """Kronecker-factored map from two one-sided transforms, each with its own rank, schedule and options.

    Args:
        left: The transform of the left basis [m, p].
        right: The transform of the right basis [n, q].

    Raises:
        SpecError: A factor has no basis of its own, or asks for the other side.
    """

    left: Transform
    right: Transform

    def __post_init__(self) -> None:
        """Check the factors; what each is asked for is its place, so that ``side`` need not be written."""
        super().__post_init__()
        for side in ("left", "right"):
            factor = getattr(self, side)
            if not isinstance(factor, BasisTransform):
                raise SpecError(
                    f"{side} must be a transform with one basis, such as svd(rank=64), not {factor.name}", option=side
                )
            require(factor.side in ("short", side), side, f"the {side} factor cannot have side={factor.side}; leave side out")
            object.__setattr__(self, side, replace(factor, side="short"))

    @cached_property
    def _factors(self) -> tuple[Transform, Transform]:
        return replace(self.left, side="left"), replace(self.right, side="right")  # type: ignore[call-arg]

    @override
    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        left, right = self._factors
        return left.coords_shape(shape)[0], right.coords_shape(shape)[1]

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        left, right = self._factors
        return left.basis_shapes(shape)[0], right.basis_shapes(shape)[1]

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        # a factor drawn from a seed lives in the map alone
        kept = [factor for factor in self._factors if self.stores_map or factor.reads != "nothing"]
        return [stored for factor in kept for stored in factor.storage(shape, dtype)]

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Pair:
        return Pair(*(t.init(shape, seed=seed, device=device, dtype=dtype) for t in self._factors))

    @override
    def refresh(self, state: Pair, grad: Gradient | None, when: When) -> Pair:
        return Pair(*(t.refresh(s, grad, when) if due else s for t, s, due in self._now(state, when)))

    @override
    def probes(self, state: Pair, when: When) -> tuple[Probe, ...]:
        asked = [t.probes(s, when) for t, s, due in self._now(state, when) if due]
        return tuple(probe for probes in asked for probe in probes)

    @override
    def learn(self, state: Pair, sketch: Sketch, when: When) -> Pair:
        found = []
        for factor, own, due in self._now(state, when):
            count = len(factor.probes(own, when)) if due else 0
            found.append(factor.learn(own, sketch[:count], when) if due else own)
            sketch = sketch[count:]
        return Pair(*found)

    def _now(self, state: Pair, when: When) -> list[tuple[Transform, Any, bool]]:
        """The factors with their states, and which of them are due: both at the first refresh, however late it comes."""
        both = when.refreshes == 0
        return [(t, s, both or t.due(when.step)) for t, s in zip(self._factors, state, strict=True)]

    @override
    def map(self, state: Pair) -> LinearMap:
        left, right = self._factors
        return two_sided(left.map(state.left), right.map(state.right))

    @property
    @override
    def reads(self) -> Reads:
        found = {self.left.reads, self.right.reads}
        return next(kind for kind in get_args(Reads) if kind in found)  # the one that reads most decides for both

    @property
    @override
    def stores_map(self) -> bool:
        return self.left.stores_map and self.right.stores_map

    @property
    @override
    def period(self) -> int:
        return max(self.left.period, self.right.period)

    @override
    def due(self, step: int) -> bool:
        return self.left.due(step) or self.right.due(step)
