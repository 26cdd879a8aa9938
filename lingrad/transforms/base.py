"""What a transform is: an immutable choice of how a weight's basis is picked and refreshed.

A transform holds no tensors, no optimizer and no mode. Its state is a NamedTuple of tensors, ints and dicts of them, passed
in and out. `Transform` is the whole interface; `lingrad.transforms.side` adds the options and the orientation that every
transform with a basis of given rank shares, so that a new one writes only how its basis is found.
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

# What a refresh looks at. ``gradient``: G itself, kept until the step, which is the first to use the new basis. ``sketch``:
# products of G with matrices that were fixed before the step; they add up over micro-batches, no G exists, and the new basis
# serves from the next step on, since its own projection of a G that is gone cannot be had. ``nothing``: drawn beforehand.
Reads = Literal["gradient", "sketch", "nothing"]


class When(NamedTuple):
    """When a refresh happens, and for which weight.

    Args:
        step: Steps finished so far.
        refreshes: Refreshes of this weight so far; 0 at the first.
        seed: The seed of this weight, the same on every rank; mix ``step`` into it for anything random.
        shape: (m, n), the weight's shape.
        run_seed: The seed of the run, for what all weights may draw alike.
    """

    step: int
    refreshes: int
    seed: int
    shape: tuple[int, int]
    run_seed: int = 0


class Probe(NamedTuple):
    """A product that a refresh asks of the gradient, ``left.T @ G @ right``, a missing factor meaning the identity.

    Args:
        left: [m, a], or None.
        right: [n, b], or None.
    """

    left: Tensor | None
    right: Tensor | None


Sketch = tuple[Tensor, ...]  # the products, in the order of the probes, in at least float32


@dataclass(frozen=True)
class Transform(ABC):
    """How the map of one weight is chosen and refreshed; config only.

    Laws: ``init`` gives a state whose map is valid before any refresh; ``refresh`` is pure; ``map(state)`` depends on the
    state alone and maps coordinates of shape ``coords_shape(shape)``.
    """

    name: ClassVar[str]  # what config strings call it; set by `register`

    def __post_init__(self) -> None:
        """Check every option against its annotation; a subclass that checks more calls this first."""
        options.check(self)

    @abstractmethod
    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the coordinates.

        Args:
            shape: (m, n), the weight's shape.

        Returns:
            (p, q).

        Raises:
            ShapeError: The rank does not fit the shape.
        """

    @abstractmethod
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The state before the first refresh.

        Args:
            shape: (m, n), the weight's shape.
            seed: The seed of this weight, the same on every rank.
            device: Where the basis lives.
            dtype: The dtype of the basis, the weight's.

        Returns:
            A NamedTuple of tensors, ints, None and dicts of them.
        """

    @abstractmethod
    def refresh(self, state: Any, grad: Gradient | None, when: When) -> Any:
        """Choose a new basis.

        Args:
            state: The state that `init` or the last refresh gave; left as it is.
            grad: G [m, n], finite and not zero; None where it reads nothing.
            when: The step, the number of refreshes so far, the weight's seed.

        Returns:
            The new state.
        """

    def probes(self, state: Any, when: When) -> tuple[Probe, ...]:
        """The products that `learn` needs, fixed before the step; none unless it reads a sketch.

        Args:
            state: The state that `init` or the last refresh gave.
            when: As for `refresh`.

        Returns:
            The probes. One that has the factors of the current map costs nothing: it is what the coordinates get.
        """
        return ()

    def learn(self, state: Any, sketch: Sketch, when: When) -> Any:
        """Choose a new basis from a sketch; what reads nothing needs none.

        Args:
            state: The state that `init` or the last refresh gave; left as it is.
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
        """Steps between refreshes, over which ``stagger`` spreads the weights; 0 where there is no second one."""

    @property
    def reads(self) -> Reads:
        """What a refresh looks at; a transform that reads nothing is refreshed before the step's forward, at no cost."""
        return "gradient"

    @property
    def stores_map(self) -> bool:
        """Whether the map is kept between uses; False where it is cheaper to make again than to hold."""
        return True

    @abstractmethod
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Shapes of the left and right basis that stay in memory, [m, p] and [n, q]; None where there is none."""

    @abstractmethod
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        """What stays in memory between steps, tensor by tensor: the row of this transform in the memory ledger.

        Args:
            shape: (m, n), the weight's shape.
            dtype: The weight's dtype.

        Returns:
            Shape and dtype of each tensor of the state after the first refresh, and of the map where it is kept.
        """
