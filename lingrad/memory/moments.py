"""Which moments of a run are stored in 8 bits, which are not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lingrad.console import columns
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.optimizers.base import Base
from lingrad.optimizers.eight_bit import SCALES, SMALLEST
from lingrad.tensors import TensorSpec, wide


@dataclass(frozen=True)
class Moment:
    """One moment of one parameter.

    Args:
        name: The parameter's name. The moments of a transformed weight are those of its coordinates.
        key: Its key in the base optimizer's state; ``moment 1`` and so on before the first step.
        numbers: Its elements.
        bits: Bits per element.
        nbytes: Bytes, scales included.
        why: Why it is not in 8 bits; empty if it is.
    """

    name: str
    key: str
    numbers: int
    bits: int
    nbytes: int
    why: str = ""


@dataclass(frozen=True)
class MomentReport:
    """The moments of a run.

    Args:
        moments: All moments; step counters and other scalars are not listed.
        books: Bytes of the code books in memory.
        expected: True before the first step: the moments are those that the run will have.
    """

    moments: tuple[Moment, ...]
    books: int = 0
    expected: bool = False

    @property
    def quantised(self) -> tuple[Moment, ...]:
        """The moments in 8 bits."""
        return tuple(moment for moment in self.moments if not moment.why)

    @property
    def others(self) -> tuple[Moment, ...]:
        """The moments that are not in 8 bits."""
        return tuple(moment for moment in self.moments if moment.why)

    @property
    def nbytes(self) -> int:
        """Bytes of all moments and code books."""
        return sum(moment.nbytes for moment in self.moments) + self.books

    def __str__(self) -> str:
        kinds: dict[tuple[int, str], Counter[str]] = {}
        for moment in self.moments:
            found = kinds.setdefault((moment.bits, moment.why), Counter())
            found.update(moments=1, numbers=moment.numbers, nbytes=moment.nbytes)
        rows: list[tuple[str, ...]] = [("bits", "moments", "elements", "bytes", "why not 8 bits")]
        for (bits, why), count in sorted(kinds.items()):
            rows.append((str(bits), *(f"{count[key]:,}" for key in ("moments", "numbers", "nbytes")), why))
        if self.books:
            rows.append(("", "", "", f"{self.books:,}", "code books"))
        head = "after the first step there will be\n" if self.expected else ""
        lines = columns(rows, right=[True] * 4 + [False])
        return head + "\n".join(lines)


def moments(optimizer: SubspaceOptimizer) -> MomentReport:
    """Which moments of a run are stored in 8 bits, which are not, and why.

    Args:
        optimizer: The run. Its base may be one of bitsandbytes, or any base with ``moments="8bit"``.

    Returns:
        The report; ``str`` of it is a table.
    """
    found: list[Moment] = []
    books: dict[int, int] = {}
    state = optimizer.state
    entries = {param: _of_base(state.get(param, {})) for group in optimizer.param_groups for param in group["params"]}
    expected = not any(entries.values())
    for group in optimizer.param_groups:
        base = optimizer.base_of(group["kind"])
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if expected:
                dtype = wide(param.dtype) if group["kind"] == "coords" else param.dtype
                found += _expected(name, base.moments(tuple(param.shape), dtype), base)
            else:
                found += _present(name, entries[param], base, books)
    return MomentReport(tuple(found), sum(books.values()), expected)


def _of_base(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: t for key, t in entries.items() if isinstance(t, Tensor) and t.numel() > 1 and not key.startswith("subspace.")}


def _present(name: str, entries: Mapping[str, Tensor], base: Base, books: dict[int, int]) -> Iterator[Moment]:
    for key, value in entries.items():
        if key.startswith("qmap"):
            books[value.data_ptr()] = value.nbytes
        elif not (key.endswith(SCALES) or key.startswith("absmax")):
            scales = entries.get(key + SCALES, entries.get(key.replace("state", "absmax")))
            yield _moment(name, key, value.numel(), value.dtype, value.nbytes, scales, base)


def _expected(name: str, tensors: list[TensorSpec], base: Base) -> Iterator[Moment]:
    several = [tensor for tensor in tensors if prod(tensor.shape) > 1 or tensor.dtype == torch.uint8]
    number = 0
    for i, tensor in enumerate(several):
        if i and several[i - 1].dtype == torch.uint8:
            continue  # the scales of the tensor before it
        number += 1
        scales = several[i + 1] if tensor.dtype == torch.uint8 and i + 1 < len(several) else None
        yield _moment(name, f"moment {number}", prod(tensor.shape), tensor.dtype, tensor.nbytes, scales, base)


def _moment(
    name: str, key: str, numbers: int, dtype: torch.dtype, nbytes: int, scales: Tensor | TensorSpec | None, base: Base
) -> Moment:
    if dtype == torch.uint8:
        return Moment(name, key, numbers, 8, nbytes + (0 if scales is None else scales.nbytes))
    return Moment(name, key, numbers, 8 * dtype.itemsize, nbytes, _why(numbers, base))


def _why(numbers: int, base: Base) -> str:
    if base.quantizer is not None:
        smallest = base.quantizer.smallest
    elif "8bit" in base.name.lower():  # a base of bitsandbytes, which has the same default
        smallest = base.options.get("min_8bit_size", SMALLEST)
    else:
        return f"base '{base.name}' does not quantise its moments"
    if numbers < smallest:
        return f"fewer than {smallest:,} elements (min_8bit_size)"
    return f"base '{base.name}' chose not to"
