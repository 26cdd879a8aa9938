"""`kron`: a left basis chosen by one transform and a right basis by another, S z = P z Q^T."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, final, get_args

import torch
from typing_extensions import override

from lingrad.errors import SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.maps import LinearMap, two_sided
from lingrad.tensors import TensorSpec
from lingrad.transforms.base import Probe, Ranks, Reads, Sketch, Transform, When
from lingrad.transforms.registry import register
from lingrad.transforms.side import BasisTransform


class KronState(NamedTuple):
    """State of `Kron`: the states of its two sides."""

    left: Any
    right: Any


@register("kron")
@final
class Kron(Transform):
    """Kronecker-factored map from two one-sided transforms, each with its own rank, schedule and options.

    Args:
        left: The transform of the left basis [m, p].
        right: The transform of the right basis [n, q].

    Raises:
        SpecError: A factor has no basis of its own, or names the other side.
    """

    left: Transform
    right: Transform

    def __post_init__(self) -> None:
        """Check the factors; each has its own side, so that ``side`` need not be written."""
        super().__post_init__()
        for side in ("left", "right"):
            factor = getattr(self, side)
            if not isinstance(factor, BasisTransform):
                raise SpecError(
                    f"{side} must be a transform with one basis, such as svd(rank=64), not {factor.name}", option=side
                )
            require(factor.side in ("short", side), side, f"the {side} factor cannot have side={factor.side}; leave side out")
            require(factor.rule is None, side, f"the {side} factor of kron refreshes every so many steps; leave schedule out")
            object.__setattr__(self, side, replace(factor, side="short"))

        read = {self.left.reads, self.right.reads}
        if "weight" in read and read & {"gradient", "sketch"}:
            early, late = ("left", "right") if self.left.reads == "weight" else ("right", "left")
            raise SpecError(
                f"the {early} factor reads the weight, before a step, and the {late} one the gradient, in it; next to one that "
                "reads the weight can be another such, or one that reads nothing, such as random",
                option=early,
            )

    @cached_property
    def _factors(self) -> tuple[Transform, Transform]:
        return replace(self.left, side="left"), replace(self.right, side="right")  # type: ignore[call-arg]

    @override
    def ranks(self, shape: tuple[int, int]) -> Ranks:
        left, right = self._factors
        return left.ranks(shape)[0], right.ranks(shape)[1]

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        left, right = self._factors
        return left.basis_shapes(shape)[0], right.basis_shapes(shape)[1]

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        if self.stores_map:
            return [tensor for factor in self._factors for tensor in factor.storage(shape, dtype)]
        # the basis of a factor that reads nothing, or stores indices alone, is in the map only
        stored = [factor for factor in self._factors if factor.reads != "nothing"]
        options: Any = {"store": False}
        unstored = [replace(factor, **options) if hasattr(factor, "store") else factor for factor in stored]
        return [tensor for factor in unstored for tensor in factor.storage(shape, dtype)]

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> KronState:
        return KronState(*(t.init(shape, seed=seed, device=device, dtype=dtype) for t in self._factors))

    @override
    def refresh(self, state: KronState, grad: Gradient | None, when: When) -> KronState:
        return KronState(*(t.refresh(s, grad, when) if due else s for t, s, due in self._now(state, when)))

    @override
    def probes(self, state: KronState, when: When) -> tuple[Probe, ...]:
        return tuple(probe for t, s, due in self._now(state, when) if due for probe in t.probes(s, when))

    @override
    def learn(self, state: KronState, sketch: Sketch, when: When) -> KronState:
        found = []
        for factor, own, due in self._now(state, when):
            count = len(factor.probes(own, when)) if due else 0
            found.append(factor.learn(own, sketch[:count], when) if due else own)
            sketch = sketch[count:]
        return KronState(*found)

    def _now(self, state: KronState, when: When) -> list[tuple[Transform, Any, bool]]:
        """The factors with their states, and which of them are due: both at the first refresh, whenever that is."""
        both = when.refreshes == 0
        return [(t, s, both or t.due(when.step)) for t, s in zip(self._factors, state, strict=True)]

    @override
    def map(self, state: KronState) -> LinearMap:
        left, right = self._factors
        return two_sided(left.map(state.left), right.map(state.right))

    @property
    @override
    def reads(self) -> Reads:
        found = {self.left.reads, self.right.reads}
        return next(kind for kind in get_args(Reads) if kind in found)  # in that order each gives the later ones what they need

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
