"""Blocks of rows of one weight, each with a map of its own: the matrices of fused experts, one under the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.gradients.local import DenseGradient, RowsGradient
from lingrad.maps.base import LinearMap, as_gradient
from lingrad.maps.factors import Factors
from lingrad.maps.kronecker import BLOCK, KroneckerMap, nearest, two_factors
from lingrad.tensors import cast, storage


@final
@dataclass(frozen=True, eq=False)
class StackedMap(LinearMap):
    """Maps of any kind, one for each of several blocks of rows of equal height.

    Coordinates of the blocks are one under the other too: [p, q] each, [count * p, q] together.

    Args:
        maps: The maps, of one shape.
    """

    maps: tuple[LinearMap, ...]

    @override
    def lift(self, coords: Tensor) -> Tensor:
        return torch.cat([one.lift(part) for one, part in zip(self.maps, coords.chunk(len(self.maps)), strict=True)])

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        parts = _blocks(as_gradient(grad), len(self.maps))
        return torch.cat([one.project(part) for one, part in zip(self.maps, parts, strict=True)])

    @property
    @override
    def T(self) -> LinearMap:
        return _TransposedMap(self)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for one in self.maps for tensor in one.tensors)

    @override
    def factors(self, coords: Tensor) -> Factors:
        parts = zip(self.maps, coords.chunk(len(self.maps)), strict=True)
        return _thinner(super().factors(coords), [one.factors(part) for one, part in parts])

    @override
    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        for one, rows, part in self._parts(weight, coords):
            one.add_lift_(rows, part)

    @override
    def add_rounded_lift_(self, weight: Tensor, coords: Tensor) -> None:
        for one, rows, part in self._parts(weight, coords):
            one.add_rounded_lift_(rows, part)

    @override
    def residual(self, matrix: Tensor) -> Tensor:
        return torch.cat([one.residual(rows) for one, rows in zip(self.maps, matrix.chunk(len(self.maps)), strict=True)])

    @override
    def transport(self, old: LinearMap, coords: Tensor) -> Tensor:
        if not isinstance(old, StackedMap):
            return super().transport(old, coords)
        parts = zip(self.maps, old.maps, coords.chunk(len(self.maps)), strict=True)
        return torch.cat([new.transport(before, part) for new, before, part in parts])

    @override
    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        if not isinstance(old, StackedMap):
            return super().transport_squares(old, squares)
        parts = zip(self.maps, old.maps, squares.chunk(len(self.maps)), strict=True)
        return torch.cat([new.transport_squares(before, part) for new, before, part in parts])

    def _parts(self, weight: Tensor, coords: Tensor) -> Iterator[tuple[LinearMap, Tensor, Tensor]]:
        return zip(self.maps, weight.chunk(len(self.maps)), coords.chunk(len(self.maps)), strict=True)


@final
@dataclass(frozen=True, eq=False)
class BatchedMap(LinearMap):
    """A `StackedMap` of `KroneckerMap`, all of whose products are batched: ``lift(z)[e] = left[e] @ z[e] @ right[e].T``.

    Args:
        count: How many blocks there are.
        left: [count, m, p], or None for the identity; m is the height of a block.
        right: [count, n, q], or None for the identity.
    """

    count: int
    left: Tensor | None
    right: Tensor | None

    @override
    def lift(self, coords: Tensor) -> Tensor:
        return self._lifted(self._split(coords), slice(None)).flatten(0, 1)

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        grad = as_gradient(grad)
        if isinstance(grad, RowsGradient):  # formed once, not once for each block
            grad = DenseGradient(grad.dense())
        if not isinstance(grad, DenseGradient):
            parts = zip(_blocks(grad, self.count), self._each(self.left), self._each(self.right), strict=True)
            return torch.cat([part.product(left, right) for part, left, right in parts])
        found = self._split(grad.matrix)
        if self.left is not None:
            found = cast(self.left, found.dtype).mT @ found
        if self.right is not None:
            found = found @ cast(self.right, found.dtype)
        return found.flatten(0, 1)

    @property
    @override
    def T(self) -> LinearMap:
        return _TransposedMap(self)

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.left, self.right) if t is not None)

    @override
    def factors(self, coords: Tensor) -> Factors:
        parts = zip(self._each(self.left), self._each(self.right), self._split(coords), strict=True)
        return _thinner(super().factors(coords), [KroneckerMap(left, right).factors(part) for left, right, part in parts])

    @override
    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        blocks, parts = self._split(weight), self._split(coords)
        # where dtypes differ the lift is in the coordinates' own and is rounded once, in the sum; it takes more memory than
        # the weight, so that some blocks are lifted at a time
        some = max(1, BLOCK // blocks[0].numel())
        for start in range(0, self.count, some):
            chosen = slice(start, start + some)
            blocks[chosen].add_(self._lifted(parts[chosen], chosen))

    @override
    def add_rounded_lift_(self, weight: Tensor, coords: Tensor) -> None:
        sides = self.left, self._split(coords), None if self.right is None else self.right.mT
        factors = [side for side in sides if side is not None]
        if len(factors) == 1:  # the identity has no product
            self.add_lift_(weight, coords)
        else:
            self._split(weight).baddbmm_(*two_factors([cast(factor, weight.dtype) for factor in factors]))

    @override
    def residual(self, matrix: Tensor) -> Tensor:
        blocks = self._split(matrix)
        return (blocks - nearest(self.left, nearest(self.right, blocks.mT).mT)).flatten(0, 1)

    @override
    def norm(self, coords: Tensor) -> Tensor:
        return _both_sides(self, self, coords, power=1).mul(coords).sum().clamp_min(0).sqrt()

    @override
    def transport(self, old: LinearMap, coords: Tensor) -> Tensor:
        if not isinstance(old, BatchedMap):
            return super().transport(old, coords)
        return _both_sides(self, old, coords, power=1)

    @override
    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        if not isinstance(old, BatchedMap):
            return super().transport_squares(old, squares)
        return _both_sides(self, old, squares, power=2)

    def each(self, block: int) -> KroneckerMap:
        """The map of one block."""
        return KroneckerMap(*(None if side is None else side[block] for side in (self.left, self.right)))

    def _split(self, matrix: Tensor) -> Tensor:
        split: Tensor = matrix.unflatten(0, (self.count, -1))
        return split

    def _each(self, side: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * self.count if side is None else side.unbind()

    def _lifted(self, parts: Tensor, chosen: slice) -> Tensor:
        if self.left is not None:
            parts = cast(self.left[chosen], parts.dtype) @ parts
        if self.right is not None:
            parts = parts @ cast(self.right[chosen], parts.dtype).mT
        return parts


@final
@dataclass(frozen=True, eq=False)
class _TransposedMap(LinearMap):
    """The transpose of a map, computed by the map itself.

    Args:
        source: The map.
    """

    source: LinearMap

    @override
    def lift(self, coords: Tensor) -> Tensor:
        return self.source.lift(coords.t()).t()

    @override
    def project(self, grad: Gradient | Tensor) -> Tensor:
        return self.source.project(as_gradient(grad).T).t()

    @property
    @override
    def T(self) -> LinearMap:
        return self.source

    @property
    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return self.source.tensors


def stacked_map(maps: Sequence[LinearMap]) -> LinearMap:
    """The map of a weight whose blocks of rows have these maps.

    Args:
        maps: One for each block, all of one shape.

    Returns:
        A `BatchedMap` if all are Kronecker maps, since its products are cheaper; otherwise a `StackedMap`.
    """
    if not all(isinstance(one, KroneckerMap) for one in maps):
        return StackedMap(tuple(maps))
    sides = [[getattr(one, side) for one in maps] for side in ("left", "right")]
    return BatchedMap(len(maps), *(None if side[0] is None else _joined(side) for side in sides))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, [count, ...]: a view where they lie one behind the other in memory, as slices do."""
    first, size = parts[0], parts[0].numel()
    adjacent = all(
        storage(part) == storage(first) and part.is_contiguous() and part.storage_offset() == first.storage_offset() + size * i
        for i, part in enumerate(parts)
    )
    if not adjacent:
        return torch.stack(list(parts))
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()), first.storage_offset())


def _blocks(grad: Gradient, count: int) -> list[Gradient]:
    """A gradient's blocks of rows, of equal height."""
    if isinstance(grad, DenseGradient):
        return [DenseGradient(rows) for rows in grad.matrix.chunk(count)]
    return [grad.select(rows, None) for rows in torch.arange(grad.shape[0], device=grad.device).chunk(count)]


def _thinner(whole: Factors, parts: Sequence[Factors]) -> Factors:
    """A change as factors of the sum of its blocks' ranks, unless those of the whole are as thin."""
    if sum(part.rank for part in parts) >= whole.rank:
        return whole
    return Factors(torch.block_diag(*(part.left for part in parts)), torch.cat([part.right for part in parts]))


def _both_sides(new: BatchedMap, old: BatchedMap, coords: Tensor, *, power: int) -> Tensor:
    """Apply (new.T @ old)**power of each block, elementwise, from each side that has a basis."""

    def overlap(a: Tensor, b: Tensor) -> Tensor:
        return (cast(a, coords.dtype).mT @ cast(b, coords.dtype)) ** power

    found: Tensor = coords.unflatten(0, (new.count, -1))
    if new.left is not None and old.left is not None:
        found = overlap(new.left, old.left) @ found
    if new.right is not None and old.right is not None:
        found = found @ overlap(new.right, old.right).mT
    return found.flatten(0, 1)
