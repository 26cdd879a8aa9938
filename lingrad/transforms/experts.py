"""`experts`: several matrices fused in one weight, one under the other, each with a basis of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.errors import ShapeError, SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.gradients.local import DenseGradient
from lingrad.maps import LinearMap, stacked_map
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms.base import Ranks, Reads, Transform, When
from lingrad.transforms.linalg import derive_seed
from lingrad.transforms.registry import register
from lingrad.transforms.schedules import AdaptiveSchedule


class EachNumber(NamedTuple):
    """A number of each expert.

    Args:
        of: The expert's index, as a word -> its number.
    """

    of: dict[str, Any]


class ExpertsState(NamedTuple):
    """State of `Experts`. The names are keys in checkpoints.

    Args:
        each: The states of the experts as one: tensors [count, ...], and an `EachNumber` where a state has a number.
        refreshes: How often the basis of each was refreshed.
    """

    each: Any
    refreshes: EachNumber


@register("experts")
@final
class Experts(Transform):
    """The weight's rows are the matrices of ``count`` experts, [count * m, n]; each has a basis of its own, by ``each``.

    All products are batched over the experts. A refresh chooses the basis of each expert from its own gradient, which is formed
    also where ``each`` would read a sketch: the new basis is then used in the same step. An expert whose gradient is zero at a
    refresh, since no token was sent to it, keeps the basis it has until the next one; before its first, that is a random one.

    Args:
        each: The transform of one expert's matrix.
        count: How many experts there are; 0 means the first dimension of a weight with three.

    Raises:
        SpecError: An option is out of range, or ``each`` is ``experts`` again.
    """

    uncoded = "write experts(each=coded(each=...)), for codes of each expert's"

    each: Transform
    count: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.count >= 0, "count", f"count must be 0 or more, not {self.count}")
        if isinstance(self.each, Experts):
            raise SpecError(
                f"each must be the transform of one expert's matrix, such as svd(rank=8), not {self.each.name}", option="each"
            )
        rule = self.each.rule
        require(
            rule is None or rule.decides == "steps",
            "each",
            f"the bases of all experts are refreshed together, for which schedule={rule and rule.name} has no common figure; "
            "give experts schedule=path(...), or none, by a rule of their own",
        )

    @property
    @override
    def blocks(self) -> int:
        return max(self.count, 1)

    def of(self, count: int) -> Experts:
        """The transform of a weight that fuses so many experts.

        Args:
            count: How many.

        Returns:
            This one, if it says how many itself.
        """
        return self if self.count else replace(self, count=count)

    def one(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of one expert's matrix.

        Args:
            shape: That of all, one under the other.

        Returns:
            (m, n).

        Raises:
            ShapeError: The rows are not those of ``count`` experts.
        """
        rows, columns = shape
        if not self.count or rows % self.count or rows < self.count:
            how = f"{rows} rows are not those of {self.count} experts" if self.count else "it does not say of how many experts"
            raise ShapeError(
                f"experts(...) does not fit a {rows} x {columns} weight: {how}; expected count=..., a divisor of {rows} (to "
                "be left out where a weight has three dimensions: the first counts the experts)"
            )
        return rows // self.count, columns

    @override
    def ranks(self, shape: tuple[int, int]) -> Ranks:
        left, right = self.each.ranks(self.one(shape))
        return None if left is None else self.count * left, right

    @override
    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        p, q = self.each.coords_shape(self.one(shape))
        return self.count * p, q

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        left, right = (
            None if side is None else (self.count * side[0], side[1]) for side in self.each.basis_shapes(self.one(shape))
        )
        return left, right

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        stored = self.each.storage(self.one(shape), dtype)
        return [TensorSpec((self.count, *tensor.shape), tensor.dtype) for tensor in stored]

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> ExpertsState:
        one = self.one(shape)
        seeds = [_seed(seed, e) for e in range(self.count)]
        states = [self.each.init(one, seed=own, device=device, dtype=dtype) for own in seeds]
        return ExpertsState(_together(states), _together([0] * self.count))

    @override
    def refresh(self, state: ExpertsState, grad: Gradient | None, when: When) -> ExpertsState:
        one, found, counts = self.one(when.shape), [], []
        parts = [None] * self.count if grad is None else _formed(grad).chunk(self.count)
        for e, part in enumerate(parts):
            old, refreshes = _apart(state.each, e), _apart(state.refreshes, e)
            own = When(when.step, refreshes, _seed(when.seed, e), one, when.run_seed)
            seen = part is None or bool(part.any())
            found.append(self.each.refresh(old, None if part is None else DenseGradient(part), own) if seen else old)
            counts.append(refreshes + int(seen))
        return ExpertsState(_together(found), _together(counts))

    @override
    def map(self, state: ExpertsState) -> LinearMap:
        return stacked_map([self.each.map(_apart(state.each, e)) for e in range(self.count)])

    @property
    @override
    def reads(self) -> Reads:
        return self.each.reads if self.each.before_step else "gradient"

    @property
    @override
    def rule(self) -> AdaptiveSchedule | None:
        return self.each.rule

    @property
    @override
    def stores_map(self) -> bool:
        return self.each.stores_map

    @property
    @override
    def period(self) -> int:
        return self.each.period

    @override
    def due(self, step: int) -> bool:
        return self.each.due(step)


def _formed(grad: Gradient) -> Tensor:
    """The matrix; of float16 factors in float32, since its entries may overflow where its projection does not."""
    return (grad if isinstance(grad, DenseGradient) else grad.to(wide(grad.dtype))).dense()


def _seed(seed: int, expert: int) -> int:
    return derive_seed(seed, "expert", expert)


def _together(states: Sequence[Any]) -> Any:
    """States of one kind as one: each tensor [count, ...], each number an `EachNumber`."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(list(states))
    if hasattr(first, "_asdict"):
        return type(first)(*(_together(leaves) for leaves in zip(*states, strict=True)))
    if isinstance(first, dict):
        return {key: _together([state[key] for state in states]) for key in first}
    return EachNumber({str(e): number for e, number in enumerate(states)})


def _apart(state: Any, expert: int) -> Any:
    """The state of one expert; its tensors are slices."""
    if isinstance(state, Tensor):
        return state[expert]
    if isinstance(state, EachNumber):
        return state.of[str(expert)]
    if hasattr(state, "_asdict"):
        return type(state)(*(_apart(leaf, expert) for leaf in state))
    if isinstance(state, dict):
        return {key: _apart(leaf, expert) for key, leaf in state.items()}
    return state
