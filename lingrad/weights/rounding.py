"""How a merge rounds W + S z to a weight of few bits: to the nearest number, at random without bias, or with the error kept.

Nearest rounding drops every change that is smaller than half a step of the weight's grid. (Zamirai, Zhang, Aberger, De Sa,
"Revisiting BFloat16 Training", 2020, arXiv 2010.06192: stochastic rounding, and Kahan summation. INT8 weights trained by
stochastic rounding: Zhang et al., "Q-GaLore", 2024, arXiv 2407.08296.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lingrad.tensors import wide

RoundingKind = Literal["nearest", "stochastic", "compensated"]

BLOCK = 2**20  # elements that are rounded at a time
FULL = 127  # the largest code of an 8-bit weight
FINE = 254  # steps of the kept error in one step of an 8-bit weight: its codes are -127 to 127 too
FINER = 2**16  # steps of the kept error between neighbouring numbers of 16 bits: with it they are as exact as float32


class Rounding:
    """The rounding of one weight, other than to the nearest.

    The random numbers depend on the seed, on how often the weight was rounded, and on an element's row and column: they are the
    same in every process, on every device, after a resume, and for each part of a weight that is cut.

    Args:
        kind: ``stochastic``, or ``compensated``, which keeps what was rounded away in as many bits as the weight has: 16 bits
            and the weight's own are as exact as float32.
        seed: Of this weight, the same in every process.

    Attributes:
        count: How often the weight was rounded.
        error: What is kept, like the weight; None where nothing is, or nothing was rounded yet.
        first: The row and the column of the weight where this process's part of it begins.
    """

    def __init__(self, kind: RoundingKind, seed: int) -> None:
        self.kind = kind
        self.seed = seed
        self.count = 0
        self.error: Tensor | None = None
        self.first = (0, 0)

    def add_(self, matrix: Tensor, change: Tensor | None, factor: float | Tensor = 1.0) -> None:
        """``matrix = round(factor * matrix + change)``, in place.

        Args:
            matrix: [m, n], bfloat16 or float16; of other dtypes the sum is as torch rounds it.
            change: [m, n], at least float32; None adds nothing.
            factor: The decay, 1 for none.
        """
        if matrix.dtype not in _BITS:  # the model was cast to a dtype in which nothing is lost
            matrix.mul_(factor)
            if change is not None:
                matrix.add_(change)
            return
        for rows, error in self._blocks(matrix):
            wanted = matrix[rows].float()
            if error is not None:
                wanted.add_(_spacing(matrix[rows]).mul_(error).div_(FINER))
            wanted.mul_(factor)
            if change is not None:
                wanted.add_(change[rows])
            rounded = wanted.to(matrix.dtype)
            left = wanted.sub_(rounded)
            if error is None:
                rounded = self._moved(rounded, left, rows.start)
            else:
                steps = left.div_(_spacing(rounded)).mul_(FINER).round_().nan_to_num_(0.0, 0.0, 0.0)
                error.copy_(steps.clamp_(1 - FINER / 2, FINER / 2 - 1))
            matrix[rows] = rounded

    def encode_(self, codes: Tensor, wanted: Tensor, scales: Tensor) -> None:
        """Write the codes of a matrix, of -127 to 127 with a scale for each row.

        Args:
            codes: int8 [m, n], overwritten.
            wanted: [m, n], float32; what `kept` gives was added to it.
            scales: The value of code 127 in each row, [m, 1], not zero.
        """
        for rows, error in self._blocks(codes):
            steps = wanted[rows] * (FULL / scales[rows])
            if error is None:
                steps.add_(self._uniform(steps, rows.start)).floor_()
            else:
                exact = steps.clone()
                error.copy_(exact.sub_(steps.round_()).mul_(FINE).round_())
            codes[rows] = steps.clamp_(-FULL, FULL).to(torch.int8)

    def kept(self, scales: Tensor) -> Tensor | float:
        """What was rounded away from a matrix of codes, [m, n] float32; zero where nothing is kept.

        Args:
            scales: As for `encode_`, when the codes were written.

        Returns:
            To be added to the matrix.
        """
        return 0.0 if self.error is None else self.error.float().mul_(scales / (FULL * FINE))

    def nbytes(self, elements: int, dtype: torch.dtype) -> int:
        """Bytes that are kept between steps for a weight of so many elements in a dtype."""
        return elements * _BITS[dtype].itemsize if self.kind == "compensated" else 0

    def tensors(self) -> list[Tensor]:
        """What is kept."""
        return [] if self.error is None else [self.error]

    def entries(self) -> dict[str, Any]:
        """What a checkpoint holds; `load` takes it."""
        return {"count": self.count, **({} if self.error is None else {"error": self.error})}

    def load(self, entries: Mapping[str, Any], device: torch.device) -> None:
        """Take over the entries of a checkpoint.

        Args:
            entries: What `entries` gave.
            device: That of the weight.
        """
        self.count = entries["count"]
        error = entries.get("error")
        self.error = None if error is None else error.detach().clone().to(device)

    def like(self, matrix: Tensor) -> Tensor:
        """An error of zero for a weight as it is stored, [m, n]."""
        return torch.zeros(matrix.shape, dtype=_BITS[matrix.dtype], device=matrix.device)

    def _blocks(self, matrix: Tensor) -> list[tuple[slice, Tensor | None]]:
        """Some rows at a time, with the error that is kept of them; one more rounding begins."""
        self.count += 1
        if self.kind == "compensated":
            if self.error is None or self.error.dtype != _BITS[matrix.dtype]:
                self.error = self.like(matrix)
            elif self.error.device != matrix.device:
                self.error = self.error.to(matrix.device)
        m, n = matrix.shape
        size = max(1, BLOCK // max(n, 1))
        blocks = [slice(start, min(start + size, m)) for start in range(0, m, size)]
        return [(rows, None if self.error is None else self.error[rows]) for rows in blocks]

    def _moved(self, rounded: Tensor, left: Tensor, row: int) -> Tensor:
        """The nearest number or its neighbour on the other side of the exact one, by chance, so that the mean is exact."""
        bits = rounded.view(torch.int16)
        away = (left > 0) == (rounded > 0)  # whether the neighbour is larger in magnitude
        step = torch.where(away, 1, -1).to(torch.int16)
        # the neighbours of zero are the smallest numbers of either sign
        smallest = torch.where(left > 0, 1, 1 - 2**15).to(torch.int16)
        neighbour = torch.where(rounded == 0, smallest, bits + step).view(rounded.dtype)
        gap = (neighbour.float() - rounded.float()).abs_()
        chance = self._uniform(left, row).mul_(gap)
        # not a number, and infinite, are on neither side
        return torch.where((chance < left.abs()) & neighbour.isfinite(), neighbour, rounded)

    def _uniform(self, like: Tensor, row: int) -> Tensor:
        """Numbers in [0, 1) for the elements of some rows, multiples of 2^-24, float32."""
        m, n = like.shape
        first, other = (_signed(_mixed(self.seed >> shift, self.count)) for shift in (0, 32))
        rows = torch.arange(row + self.first[0], row + self.first[0] + m, device=like.device, dtype=torch.int32)
        columns = torch.arange(self.first[1], self.first[1] + n, device=like.device, dtype=torch.int32)
        bits = _mix_(_mix_(rows + first)[:, None] + _mix_(columns + other)[None, :])
        return bits.bitwise_right_shift_(8).bitwise_and_(2**24 - 1).to(wide(torch.float32)).mul_(2.0**-24)


_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.int8: torch.int8}


def _spacing(numbers: Tensor) -> Tensor:
    """How far the next larger number in magnitude is, float32, of a dtype of 16 bits; 0 where there is none."""
    gaps = ((numbers.view(torch.int16) + 1).view(numbers.dtype).float() - numbers.float()).abs_()
    return gaps.nan_to_num_(0.0, 0.0, 0.0)


def _mix_(bits: Tensor) -> Tensor:
    """A hash of 32 bits in place, int32: the finalizer of MurmurHash3 (Appleby, public domain)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_(2 ** (32 - shift) - 1))
        bits.mul_(_signed(factor))
    return bits


def _mixed(seed: int, count: int) -> int:
    """A number of 32 bits from a seed and a count."""
    bits = (seed ^ (count * 0x9E3779B1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits


def _signed(bits: int) -> int:
    """A number of 32 bits as int32 has it."""
    return bits - 2**32 if bits >= 2**31 else bits
