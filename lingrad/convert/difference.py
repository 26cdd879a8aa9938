"""D = TUNED - kept * BASE by its products, never stored: every pass reads rows of both weights anew, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import frexp, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from lingrad.errors import DataError

_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_BLOCK, _ROWS = 1 << 17, 128  # numbers of a block of rows, and the fewest rows; products of fewer wait for memory

Rows = Callable[[int, int], tuple[Tensor, Tensor]]


class Rest(NamedTuple):
    """What is left of D by a basis; sums over all entries, in float64.

    Args:
        energy: |D - Q R|_F^2.
        along: <BASE, D - Q R>.
        base: |BASE|_F^2.
        rounding: nu^2.
    """

    energy: float
    along: float
    base: float
    rounding: float


@dataclass
class Difference:
    """D = TUNED - kept * BASE [m, n], by its products.

    Args:
        shape: (m, n).
        dtype: The dtype TUNED was stored in.
        rows: (start, stop) -> those rows of TUNED and BASE.
        kept: The share of BASE.
        name: The tensor's name, for messages.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    rows: Rows
    kept: float = 1.0
    name: str = ""

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows after the other.

        Yields:
            (which, those of D, those of BASE), float64.
        """
        m, n = self.shape
        step = max(_BLOCK // n, _ROWS)
        for start in range(0, m, step):
            part = slice(start, min(m, start + step))
            tuned, base = (found.double() for found in self.rows(part.start, part.stop))
            yield part, torch.sub(tuned, base, alpha=self.kept), base

    def times(self, right: Tensor) -> Tensor:
        """D @ right, [n, b] -> [m, b]."""
        return torch.cat([change @ right for _, change, _ in self.blocks()])

    def transposed(self, left: Tensor) -> Tensor:
        """D^T @ left, [m, b] -> [n, b]."""
        total = left.new_zeros(self.shape[1], left.shape[1])
        for part, change, _ in self.blocks():
            total.addmm_(change.t(), left[part])
        return total

    def rest(self, q: Tensor, r: Tensor) -> Rest:
        """What q @ r leaves of D, entry by entry.

        Args:
            q: [m, p].
            r: [p, n].

        Returns:
            The sums.

        Raises:
            DataError: An entry is not finite.
        """
        energy = along = base_energy = rounding = 0.0
        bits = _BITS[self.dtype]
        least = frexp(torch.finfo(self.dtype).tiny)[1]  # below the smallest normal number, and at zero, units shrink no more
        for part, change, base in self.blocks():
            if r.shape[0] == 0:  # the pass that sees every entry first
                values = change.add(base, alpha=self.kept)
                exponent = torch.where(values == 0, least, torch.frexp(values)[1]).clamp(min=least).double()
                rounding += float(((exponent - bits) * 2).exp2().sum()) / 12
            change = torch.addmm(change, q[part], r, alpha=-1)
            energy += float(change.square().sum())
            along += float((change * base).sum())
            base_energy += float(base.square().sum())
            if not isfinite(energy + base_energy):
                self._refuse_what_is_no_number(part)
        return Rest(energy, along, base_energy, rounding)

    def _refuse_what_is_no_number(self, part: slice) -> None:
        for which, found in zip(("TUNED", "BASE"), self.rows(part.start, part.stop), strict=True):
            count = int((~found.isfinite()).sum())
            if count:
                raise DataError(f"{self.name or 'the weight'} of {which} has {count:,} numbers that are NaN or infinite")

    def outside(self, q: Tensor, v: Tensor) -> float:
        """|(1 - q q^T) BASE (1 - v v^T)|_F^2 for orthonormal q [m, p] and v [n, p]."""
        energy = 0.0
        inner = q.new_zeros(q.shape[1], self.shape[1])
        for part, _, base in self.blocks():
            inner.addmm_(q[part].t(), base)
            energy += float(base.square().sum()) - float((base @ v).square().sum())
        return energy - float(inner.square().sum()) + float((inner @ v).square().sum())
