"""A weight as a run uses it: a matrix that S z is added to, however its layer stores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lingrad.maps import LinearMap
from lingrad.tensors import own
from lingrad.weights.layout import Layout
from lingrad.weights.rounding import Rounding
from lingrad.weights.sharding import Sharding


class MergeLoss(NamedTuple):
    """What merges into a quantised weight have lost: W + S z is quantised again, and rounded.

    Args:
        merges: How many there were.
        last: |what is lost|_F / |S z|_F of the last one; what was kept in the new coordinates is not lost.
        total: The same of all, by sums of squares.
        lost_squares: The sum of what is lost.
        changed_squares: The sum of what was merged.
    """

    merges: int = 0
    last: float = 0.0
    total: float = 0.0
    lost_squares: float = 0.0
    changed_squares: float = 0.0

    def plus(self, lost: float, changed: float) -> MergeLoss:
        """One more merge, of a change of norm ``changed``."""
        a, b = self.lost_squares + lost**2, self.changed_squares + changed**2
        return MergeLoss(self.merges + 1, lost / changed, (a / b) ** 0.5, a, b)


class Remainder(NamedTuple):
    """What a quantised weight could not take of a merge.

    Args:
        matrix: W + S z less the weight as it is stored now, float32 [m, n].
        changed: |S z|_F.
    """

    matrix: Tensor
    changed: float


class Weight(ABC):
    """The weight of one parameter, as it is stored.

    Args:
        layout: How it is read as a matrix [m, n].

    Attributes:
        loss: What merges have lost; None where a merge loses nothing but the rounding of its dtype.
        rounding: How it is rounded; None where it is to the nearest.
        sharding: How it is spread over processes; None where each has all of it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.loss: MergeLoss | None = None
        self.rounding: Rounding | None = None
        self.sharding: Sharding | None = None

    @property
    @abstractmethod
    def param(self) -> nn.Parameter:
        """The parameter, looked up at each use, since other programs may replace it."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the weight in the forward; of a quantised one that it was quantised from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight now: other programs may change it, as where a vocabulary is resized."""
        return self.layout.weight_shape

    @property
    def matrix(self) -> Tensor:
        """The weight as it is stored, or this process's part of it, read as a matrix; a view where the strides allow one."""
        return self.layout.matrix(own(self.param.detach()))

    @abstractmethod
    def dense(self) -> Tensor:
        """W in its own shape: the parameter itself without autograd, or, dequantised, a new tensor in float32."""

    def sum(self, current: LinearMap, coords: Tensor, weight: Tensor) -> Tensor:
        """``W + S z``; S z is rounded to the weight's dtype before the sum.

        Args:
            current: The map S.
            coords: z [p, q].
            weight: W, in its own shape; of any dtype.

        Returns:
            A new tensor like ``weight``.
        """
        return weight + self.layout.restore(current.lift(coords)).to(weight.dtype)

    @abstractmethod
    def add_(self, current: LinearMap, coords: Tensor) -> Remainder | None:
        """``W += S z``, in place.

        Args:
            current: The map S.
            coords: z [p, q]; of a quantised weight not all zero.

        Returns:
            What the weight could not take, not in ``loss`` yet; None where it took all.
        """

    @abstractmethod
    def scales(self) -> list[Tensor]:
        """The tensors whose product with a factor multiplies the weight by it, for decoupled decay; see `decay_`."""

    def decay_(self, factor: float | Tensor) -> None:
        """``W *= factor``, in place; a weight without `scales` rounds the product in its own way.

        Args:
            factor: A number, or a 0-d tensor.
        """
        for tensor in self.scales():
            tensor.mul_(factor)

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that hold the weight in memory."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that make the weight, by name, for a checkpoint: writing into all of them sets it."""

    def lose(self, remainder: Remainder) -> None:
        """Count a remainder as lost.

        Args:
            remainder: What `add_` gave, less what was kept elsewhere.
        """
        if self.loss is not None:
            self.loss = self.loss.plus(float(torch.linalg.vector_norm(remainder.matrix)), remainder.changed)
