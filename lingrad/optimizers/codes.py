"""Block-wise 8-bit codes, in plain torch: code books, quantization and dequantization.

The scheme is that of Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (ICLR 2022,
arXiv 2110.02861, section 2): a block is divided by its largest magnitude, and each quotient replaced by the index of the
nearest of 256 values. An element takes comparisons, one division and one multiplication, which all devices round alike: a
tensor has the same codes on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lingrad.tensors import wide

CodeKind = Literal["8bit", "8bit_linear"]

BLOCK = 256

BUCKET = 2**22  # elements that are decoded or encoded at a time; a multiple of BLOCK

_DECADES = 7


class CodeBook(NamedTuple):
    """The values that codes stand for.

    Args:
        values: [256], float32, in order.
        middles: Boundaries between neighbouring codes, [255]; a quotient that equals one gets the lower code.
    """

    values: Tensor
    middles: Tensor


def code_book(kind: CodeKind, *, signed: bool, device: torch.device | str = "cpu") -> CodeBook:
    """The code book of a kind.

    Without a sign only zero is rounded to zero: updates are divided by such values, and a zero could make a step of any size
    (Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023, arXiv 2309.01507).

    Args:
        kind: ``8bit`` is dynamic: each of seven decades below 1 is cut into equal cells, twice as many as the decade below it,
            whose midpoints are values; 0 and 1 are added. ``8bit_linear`` is evenly spaced.
        signed: Whether there are negative values; without them there are twice as many cells.
        device: Of the result; it is computed on the CPU.

    Returns:
        The book.
    """
    values = torch.tensor(_values(kind, signed=signed), dtype=torch.float32, device="cpu")
    middles = (values[1:] + values[:-1]) / 2
    if not signed:
        middles[0] = 0.0
    return CodeBook(values.to(device), middles.to(device))


@cache
def _values(kind: CodeKind, *, signed: bool) -> tuple[float, ...]:
    if kind == "8bit_linear":
        steps = range(-127, 128) if signed else range(256)
        found = [i / steps[-1] for i in steps]
        return (*found, *found[-1:] * (256 - len(found)))  # the 256th of a symmetric grid is never chosen
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        cells = 2 ** (_DECADES - 1 - decade + (not signed))
        midpoints = [10.0**-decade * (0.1 + 0.9 * (i + 0.5) / cells) for i in range(cells)]
        values += midpoints + ([-value for value in midpoints] if signed else [])
    return tuple(sorted(values))


class Coding(NamedTuple):
    """The two functions that code one part of a tensor.

    Args:
        encode: (values [n], middles) -> (codes [n], scales [ceil(n / 256)]).
        decode: (codes [n], scales, the book's values) -> values [n].
    """

    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, Tensor], Tensor]

    def compiled(self, options: Mapping[str, Any]) -> Coding:
        """The same through ``torch.compile``: one kernel each on a GPU, in place of about 10 and 4.

        Args:
            options: As for ``torch.compile``. One graph serves tensors of all sizes unless they say otherwise.

        Returns:
            The functions, compiled at their first use.
        """
        chosen = {"dynamic": True, **options}
        return Coding(torch.compile(self.encode, **chosen), torch.compile(self.decode, **chosen))


def _encode(values: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    count, high = len(values), wide(values.dtype)
    blocks = nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    divisors = torch.where(largest > 0, largest, torch.ones_like(largest)).to(high)
    quotients = (blocks.to(high) / divisors[:, None]).to(torch.float32).view(-1)[:count]
    return torch.bucketize(quotients, middles, out_int32=True).to(torch.uint8), largest


def _decode(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    each = scales.to(wide(scales.dtype))
    each = each.repeat_interleave(BLOCK, output_size=len(each) * BLOCK)[: len(codes)]
    return (values.index_select(0, codes.int()).to(each.dtype) * each).to(scales.dtype)


PLAIN = Coding(_encode, _decode)


def quantize(values: Tensor, book: CodeBook, coding: Coding = PLAIN) -> tuple[Tensor, Tensor]:
    """The nearest code of every element, and the scale of every block.

    Args:
        values: Any shape; an element that is not finite spoils its block.
        book: The code book, on the same device.
        coding: What codes each part.

    Returns:
        Codes in the shape of ``values``, uint8, and the largest magnitude of each block [ceil(numel / 256)] in its dtype.
    """
    flat = values.detach().reshape(-1)
    if len(flat) <= BUCKET:
        codes, scales = coding.encode(flat, book.middles)
        return codes.view(values.shape), scales
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    scales = flat.new_empty(-(-len(flat) // BLOCK))
    for start in range(0, len(flat), BUCKET):
        found, largest = coding.encode(flat[start : start + BUCKET], book.middles)
        codes[start : start + BUCKET] = found
        scales[start // BLOCK : start // BLOCK + len(largest)] = largest
    return codes.view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, book: CodeBook, coding: Coding = PLAIN) -> Tensor:
    """The values that codes stand for.

    Args:
        codes: uint8, any shape.
        scales: The scale of each block.
        book: The code book that they were quantised with.
        coding: What decodes each part.

    Returns:
        Values in the shape of the codes and in the dtype of the scales.
    """
    flat = codes.view(-1)
    if len(flat) <= BUCKET:
        return coding.decode(flat, scales, book.values).view(codes.shape)
    values = scales.new_empty(flat.shape)
    for start in range(0, len(flat), BUCKET):
        part = flat[start : start + BUCKET]
        own = scales[start // BLOCK : (start + len(part) - 1) // BLOCK + 1]
        values[start : start + BUCKET] = coding.decode(part, own, book.values)
    return values.view(codes.shape)
