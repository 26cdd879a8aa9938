"""What a transform is: an immutable choice of how a weight's basis is picked and refreshed.

A transform holds no tensors, no optimizer and no mode. Its state is a NamedTuple of tensors, ints and dicts of them, passed
in and out. `Transform` is the whole interface; `BasisTransform` adds the options and the orientation that every transform
with a basis of given rank shares, so that a new one writes only how its basis is found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lingrad._typing import override
from lingrad.errors import ShapeError, SpecError, require
from lingrad.gradient import Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.stored import Stored
from lingrad.transforms import options
from lingrad.transforms.factorize import derive_seed, start_basis

Side = Literal["short", "long", "left", "right", "both"]


class When(NamedTuple):
    """When a refresh happens, and for which weight.

    Args:
        step: Steps finished so far.
        refreshes: Refreshes of this weight so far; 0 at the first.
        seed: The seed of this weight, the same on every rank; mix ``step`` into it for anything random.
    """

    step: int
    refreshes: int
    seed: int


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
            grad: G [m, n], finite and not zero; None where ``reads_gradient`` is false.
            when: The step, the number of refreshes so far, the weight's seed.

        Returns:
            The new state.
        """

    @abstractmethod
    def map(self, state: Any) -> LinearMap:
        """The linear map of a state."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether the basis is refreshed in the step that follows ``step`` finished ones."""

    @property
    def reads_gradient(self) -> bool:
        """Whether `refresh` looks at the gradient; one that does not is refreshed before the step's forward, at no cost."""
        return True

    @property
    def stores_map(self) -> bool:
        """Whether the map is kept between uses; False where it is cheaper to make again than to hold."""
        return True

    @abstractmethod
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Shapes of the left and right basis that stay in memory, [m, p] and [n, q]; None where there is none."""

    @abstractmethod
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[Stored]:
        """What stays in memory between steps, tensor by tensor: the row of this transform in the memory ledger.

        Args:
            shape: (m, n), the weight's shape.
            dtype: The weight's dtype.

        Returns:
            Shape and dtype of each tensor of the state after the first refresh, and of the map where it is kept.
        """


class Bases(NamedTuple):
    """The state of a transform that is nothing but its bases."""

    left: Tensor | None
    right: Tensor | None


@dataclass(frozen=True, kw_only=True)
class BasisTransform(Transform):
    """A transform with one basis of ``rank`` columns on one side of the weight, or on both.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once, in the first step.
        side: ``short`` puts the basis on the shorter dimension (right for a square weight), ``long`` on the other;
            ``left`` on the m rows, ``right`` on the n columns, ``both`` on both.
        clip: Lower the rank to min(m, n) where it does not fit, instead of raising.
    """

    rank: int
    every: int = 200
    side: Side = "short"
    clip: bool = False

    def __post_init__(self) -> None:
        """Check the shared options; a subclass that adds some calls this first."""
        super().__post_init__()
        require(self.rank >= 1, "rank", f"rank must be at least 1, not {self.rank}")
        require(self.every >= 0, "every", f"every must be 0 (refresh once) or more, not {self.every}")

    def ranks(self, shape: tuple[int, int]) -> tuple[int | None, int | None]:
        """Columns of the left and the right basis; None where that side has none.

        Args:
            shape: (m, n), the weight's shape.

        Returns:
            (p, q); this is the one place where ``side`` meets a shape.

        Raises:
            ShapeError: The rank exceeds min(m, n) and ``clip`` is off.
        """
        m, n = shape
        if self.rank > min(m, n) and not self.clip:
            raise ShapeError(
                f"rank {self.rank} is larger than min(m, n) = {min(m, n)} of a {m} x {n} weight; "
                "lower the rank, or let it be lowered where needed: clip=true"
            )
        rank = min(self.rank, m, n)
        right_is_short = m >= n
        left = self.side in ("left", "both") or self.side == ("long" if right_is_short else "short")
        right = self.side in ("right", "both") or self.side == ("short" if right_is_short else "long")
        return rank if left else None, rank if right else None

    @override
    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        left, right = self.ranks(shape)
        return left or shape[0], right or shape[1]

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        left, right = self.ranks(shape)
        return None if left is None else (shape[0], left), None if right is None else (shape[1], right)

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[Stored]:
        return [Stored(basis, dtype) for basis in self.basis_shapes(shape) if basis is not None]

    @override
    def due(self, step: int) -> bool:
        return step == 0 or (self.every > 0 and step % self.every == 0)

    def start(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Bases:
        """Random bases of the right shapes, for a transform that has seen no gradient yet."""
        left, right = (
            None if s is None else start_basis(*s, seed=derive_seed(seed, side), device=device, dtype=dtype)
            for side, s in zip(("left", "right"), self.basis_shapes(shape), strict=True)
        )
        return Bases(left, right)


@dataclass(frozen=True, kw_only=True)
class GradientBasis(BasisTransform):
    """A transform whose bases are functions of the gradient and the old bases, and whose state is just those bases.

    A subclass writes `bases`; orientation, start, dtype and map are done here.
    """

    @abstractmethod
    def bases(self, grad: Gradient, old: Bases, when: When) -> Bases:
        """The new bases.

        Args:
            grad: G [m, n]; use ``grad.T`` to write a right basis with the code of a left one.
            old: The bases in use; None on the side that has none, where the result must be None too.
            when: The step, the number of refreshes so far, the weight's seed.

        Returns:
            Bases of the old shapes, in any floating dtype.
        """

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Bases:
        return self.start(shape, seed=seed, device=device, dtype=dtype)

    @override
    def refresh(self, state: Bases, grad: Gradient | None, when: When) -> Bases:
        if grad is None:
            raise SpecError(
                f"{self.name} says that it reads no gradient; derive it from BasisTransform, not from GradientBasis"
            )
        new = self.bases(grad, state, when)
        for found, old, side in zip(new, state, ("left", "right"), strict=True):
            shapes = [None if b is None else tuple(b.shape) for b in (found, old)]
            if shapes[0] != shapes[1]:
                raise ShapeError(
                    f"the bases method of {self.name} gave a {side} basis of shape {shapes[0]}; expected {shapes[1]}"
                )
        return Bases(*(b if b is None or o is None else b.to(o.dtype) for b, o in zip(new, state, strict=True)))

    @override
    def map(self, state: Bases) -> LinearMap:
        return KroneckerMap(state.left, state.right)
