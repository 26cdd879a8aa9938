"""Block-wise 8-bit codes, in plain torch: the code books, and numbers to codes and back.

The scheme is that of Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (ICLR 2022,
arXiv 2110.02861, section 2): a block is divided by its largest magnitude, and each quotient replaced by the index of the
nearest of 256 values. Comparisons, one division and one multiplication a number, all of them rounded alike everywhere: a
tensor has the same codes on every device.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lingrad.tensors import wide

Kind = Literal["8bit", "8bit_linear"]

BLOCK = 256

BUCKET = 2**22  # numbers that are decoded or encoded at a time; a multiple of BLOCK

_DECADES = 7


class Book(NamedTuple):
    """The values that codes stand for.

    Args:
        values: [256], float32, in order.
        middles: Where a quotient goes over to the next code, [255]; one that is equal stays below.
    """

    values: Tensor
    middles: Tensor


def code_book(kind: Kind, *, signed: bool, device: torch.device | str = "cpu") -> Book:
    """The 256 values of quotients.

    Without a sign nothing but zero is rounded to zero: such numbers are divided by, and zeros among them would make steps of
    any size (Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023, arXiv 2309.01507).

    Args:
        kind: ``8bit`` is dynamic: each of seven decades below 1 is cut into equal cells, twice as many as the decade below it,
            and its values are their midpoints; with 0 and 1. ``8bit_linear`` is evenly spaced.
        signed: Whether there are negative values; without them there are twice as many cells.
        device: Where the book is wanted; it is computed on the CPU.

    Returns:
        The book.
    """
    values = torch.tensor(_values(kind, signed=signed), dtype=torch.float32, device="cpu")
    middles = (values[1:] + values[:-1]) / 2
    if not signed:
        middles[0] = 0.0
    return Book(values.to(device), middles.to(device))


@cache
def _values(kind: Kind, *, signed: bool) -> tuple[float, ...]:
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


def quantize(values: Tensor, book: Book) -> tuple[Tensor, Tensor]:
    """The nearest code of every number, and the blocks' scales.

    Args:
        values: Any shape; a number that is not finite takes its block with it.
        book: What `code_book` gave, on the same device.

    Returns:
        Codes in the shape of ``values``, uint8, and the largest magnitude of each block [ceil(numel / 256)] in its dtype.
    """
    flat = values.detach().reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    scales = flat.new_empty(-(-len(flat) // BLOCK))
    for start in range(0, len(flat), BUCKET):
        part = flat[start : start + BUCKET]
        blocks = nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        divisors = torch.where(largest > 0, largest, torch.ones_like(largest)).to(wide(values.dtype))
        quotients = (blocks.to(wide(values.dtype)) / divisors[:, None]).to(torch.float32).view(-1)[: len(part)]
        codes[start : start + BUCKET] = torch.bucketize(quotients, book.middles, out_int32=True)
        scales[start // BLOCK : start // BLOCK + len(largest)] = largest
    return codes.view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor, book: Book) -> Tensor:
    """The numbers that codes stand for.

    Args:
        codes: uint8, any shape.
        scales: Of their blocks.
        book: That they were quantised with.

    Returns:
        Their shape, in the dtype of the scales.
    """
    flat = codes.view(-1)
    values = scales.new_empty(flat.shape)
    for start in range(0, len(flat), BUCKET):
        part = flat[start : start + BUCKET]
        each = scales[start // BLOCK : (start + len(part) - 1) // BLOCK + 1].to(wide(scales.dtype))
        each = each.repeat_interleave(BLOCK, output_size=len(each) * BLOCK)[: len(part)]
        values[start : start + BUCKET] = book.values.index_select(0, part.int()).to(each.dtype) * each
    return values.view(codes.shape)
