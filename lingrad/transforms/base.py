"""What a transform is: an immutable choice of how the basis of a weight is chosen and refreshed.

A transform has no tensors, no optimizer and no mode. Its state is a NamedTuple of tensors, ints, None and dicts of them,
passed in and out. `Transform` is the whole interface; `lingrad.transforms.side.SideTransform` is the base class of a transform
that writes one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lingrad.gradients.base import Gradient
from lingrad.maps import LinearMap
from lingrad.tensors import TensorSpec
from lingrad.transforms import options
from lingrad.transforms.schedules import AdaptiveSchedule

# What a refresh reads. ``gradient``: G itself; the new basis is used in the same step. ``sketch``: products of G with matrices
# that are fixed before the step, summed over micro-batches without forming G; the new basis is used from the next step on,
# because G is no longer available to project. ``weight``: the weight W + S z itself, before the step. ``nothing``: the basis is
# drawn before the step.
Reads = Literal["gradient", "sketch", "weight", "nothing"]

Ranks = tuple[int | None, int | None]


class When(NamedTuple):
    """When a refresh happens, and for which weight.

    Args:
        step: Steps finished so far.
        refreshes: Refreshes of this weight so far; 0 at the first.
        seed: The seed of this weight, the same on every rank; mix ``step`` into it for anything random.
        shape: (m, n), the weight's shape.
        run_seed: The seed of the run, for random numbers that several weights share.
        side: The side whose basis is being chosen, in `SideTransform.basis`; None elsewhere.
    """

    step: int
    refreshes: int
    seed: int
    shape: tuple[int, int]
    run_seed: int = 0
    side: Literal["left", "right"] | None = None


class Probe(NamedTuple):
    """A product of the gradient that a refresh needs, ``left.T @ G @ right``; a missing factor means the identity.

    Args:
        left: [m, a], or None.
        right: [n, b], or None.
    """

    left: Tensor | None
    right: Tensor | None


Sketch = tuple[Tensor, ...]  # the products, in the order of the probes, in at least float32


@dataclass(frozen=True)
class Transform(ABC):
    """How the map of one weight is chosen and refreshed; options only.

    Laws: ``init`` gives a state whose map is valid before any refresh; ``refresh`` is pure; ``map(state)`` depends on the
    state alone and maps coordinates of shape ``coords_shape(shape)``.
    """

    name: ClassVar[str]  # the name in config strings; set by `register`
    uncoded: ClassVar[str] = ""  # why `coded` cannot keep its state in codes

    def __post_init__(self) -> None:
        """Check every option against its annotation; a subclass that checks more calls this first."""
        options.check(self)

    @abstractmethod
    def ranks(self, shape: tuple[int, int]) -> Ranks:
        """The ranks of the left and the right basis: which sides of the weight are reduced, and to how much.

        Args:
            shape: (m, n), the weight's shape.

        Returns:
            (p, q); None for a side that is not reduced.

        Raises:
            ShapeError: The rank does not fit the shape.
        """

    @abstractmethod
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The state before the first refresh.

        Args:
            shape: (m, n), the weight's shape.
            seed: The seed of this weight, the same on every rank.
            device: Where the basis is stored.
            dtype: The dtype of the basis, the weight's.

        Returns:
            A NamedTuple of tensors, ints, None and dicts of them.
        """

    @abstractmethod
    def refresh(self, state: Any, grad: Gradient | None, when: When) -> Any:
        """Choose a new basis.

        Args:
            state: The state that `init` or the last refresh gave; not modified.
            grad: G [m, n], finite and not zero; None for a transform that reads nothing. For one that reads the weight: that,
                finite, as a gradient.
            when: The step, the number of refreshes so far, the weight's seed.

        Returns:
            The new state.
        """

    def probes(self, state: Any, when: When) -> tuple[Probe, ...]:
        """The products that `learn` needs, fixed before the step; none unless the transform reads a sketch.

        Args:
            state: The state that `init` or the last refresh gave.
            when: As for `refresh`.

        Returns:
            The probes. One with the factors of the current map costs nothing: its product is the gradient of the coordinates.
        """
        return ()

    def learn(self, state: Any, sketch: Sketch, when: When) -> Any:
        """Choose a new basis from a sketch; the default is for a transform that reads nothing.

        Args:
            state: The state that `init` or the last refresh gave; not modified.
            sketch: The products of `probes` for the same ``when``; finite, not all zero.
            when: As for `refresh`.

        Returns:
            The new state.
        """
        return self.refresh(state, None, when)

    @abstractmethod
    def map(self, state: Any) -> LinearMap:
        """The linear map of a state."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether the basis is refreshed in the step that follows ``step`` finished ones."""

    @property
    @abstractmethod
    def period(self) -> int:
        """Steps between refreshes, over which ``stagger`` spreads the weights; 0 if there is only one refresh."""

    @property
    def rule(self) -> AdaptiveSchedule | None:
        """What decides at every ``period``-th step whether the basis is refreshed in it; None where it always is."""
        return None

    @property
    def reads(self) -> Reads:
        """What a refresh reads. A subclass writes ``reads = "sketch"`` in its body, without an annotation."""
        return "gradient"

    @property
    def before_step(self) -> bool:
        """Whether a refresh reads nothing of the step's backwards, and happens before its forward."""
        return self.reads in ("weight", "nothing")

    @property
    def stores_map(self) -> bool:
        """Whether the map is stored between uses; False if it is computed again at each use, to save memory."""
        return True

    @property
    def blocks(self) -> int:
        """How many blocks of rows of a weight have a basis of their own; 1 if there is one basis for the whole weight."""
        return 1

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the coordinates.

        Args:
            shape: (m, n), the weight's shape.

        Returns:
            The ranks, (p, q); m or n for a side that is not reduced.
        """
        left, right = self.ranks(shape)
        return shape[0] if left is None else left, shape[1] if right is None else right

    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Shapes of the left and right basis matrices that stay in memory, [m, p] and [n, q]; None where there is none."""
        left, right = self.ranks(shape)
        return None if left is None else (shape[0], left), None if right is None else (shape[1], right)

    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        """What stays in memory between steps; the memory estimate counts these tensors.

        Args:
            shape: (m, n), the weight's shape.
            dtype: The weight's dtype.

        Returns:
            Shape and dtype of each tensor of the state after the first refresh, and of the map if it is stored. The default is
            the basis matrices in the weight's dtype.
        """
        return [TensorSpec(basis, dtype) for basis in self.basis_shapes(shape) if basis is not None]
