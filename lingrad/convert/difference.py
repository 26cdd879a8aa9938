"""D = TUNED - decay * START by its products, never stored: every pass reads rows of both weights again, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import frexp, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from lingrad.errors import DataError

_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_BLOCK, _ROWS = 1 << 17, 128  # elements of a block of rows, and the fewest rows; products of fewer are memory-bound

Rows = Callable[[int, int], tuple[Tensor, Tensor]]


class ResidualSums(NamedTuple):
    """What a product Q R leaves of D; sums over all entries, in float64.

    Args:
        energy: |D - Q R|_F^2.
        along: <START, D - Q R>.
        start: |START|_F^2.
        rounding: nu^2.
    """

    energy: float
    along: float
    start: float
    rounding: float


@dataclass
class Difference:
    """D = TUNED - decay * START [m, n], by its products.

    Args:
        shape: (m, n).
        dtype: The dtype that TUNED is stored in.
        rows: (start, stop) -> those rows of TUNED and START.
        decay: The factor of START.
        name: The tensor's name, for messages.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    rows: Rows
    decay: float = 1.0
    name: str = ""

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """All rows, block by block.

        Yields:
            (slice, rows of D, rows of START), float64.
        """
        m, n = self.shape
        step = max(_BLOCK // n, _ROWS)
        for first in range(0, m, step):
            block = slice(first, min(m, first + step))
            tuned, start = (found.double() for found in self.rows(block.start, block.stop))
            yield block, torch.sub(tuned, start, alpha=self.decay), start

    def times(self, right: Tensor) -> Tensor:
        """D @ right, [n, b] -> [m, b]."""
        return torch.cat([change @ right for _, change, _ in self.blocks()])

    def transposed(self, left: Tensor) -> Tensor:
        """D^T @ left, [m, b] -> [n, b]."""
        total = left.new_zeros(self.shape[1], left.shape[1])
        for block, change, _ in self.blocks():
            total.addmm_(change.t(), left[block])
        return total

    def residual(self, q: Tensor, r: Tensor) -> ResidualSums:
        """What q @ r leaves of D, computed entry by entry.

        Args:
            q: [m, p].
            r: [p, n].

        Returns:
            The sums.

        Raises:
            DataError: An entry is not finite.
        """
        energy = along = start_energy = rounding = 0.0
        bits = _BITS[self.dtype]
        least = frexp(torch.finfo(self.dtype).tiny)[1]  # units do not shrink below the smallest normal number
        for block, change, start in self.blocks():
            if r.shape[0] == 0:  # the first pass over all entries
                values = change.add(start, alpha=self.decay)
                exponent = torch.where(values == 0, least, torch.frexp(values)[1]).clamp(min=least).double()
                rounding += float(((exponent - bits) * 2).exp2().sum()) / 12
            change = torch.addmm(change, q[block], r, alpha=-1)
            energy += float(change.square().sum())
            along += float((change * start).sum())
            start_energy += float(start.square().sum())
            if not isfinite(energy + start_energy):
                self._refuse_not_finite(block)
        return ResidualSums(energy, along, start_energy, rounding)

    def _refuse_not_finite(self, block: slice) -> None:
        for which, found in zip(("TUNED", "START"), self.rows(block.start, block.stop), strict=True):
            count = int((~found.isfinite()).sum())
            if count:
                raise DataError(f"{self.name or 'the weight'} of {which} has {count:,} elements that are NaN or infinite")

    def sums(self) -> ResidualSums:
        """The sums of D itself."""
        m, n = self.shape
        return self.residual(torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64))

    def outside(self, q: Tensor, v: Tensor) -> float:
        """|(1 - q q^T) START (1 - v v^T)|_F^2 for orthonormal q [m, p] and v [n, p]."""
        energy = 0.0
        inner = q.new_zeros(q.shape[1], self.shape[1])
        for block, _, start in self.blocks():
            inner.addmm_(q[block].t(), start)
            energy += float(start.square().sum()) - float((start @ v).square().sum())
        return energy - float(inner.square().sum()) + float((inner @ v).square().sum())
