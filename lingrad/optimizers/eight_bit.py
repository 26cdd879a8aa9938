"""8-bit moments for any base: between steps each is held as one byte a number with a scale for every 256, in plain torch.

The scheme is that of Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (ICLR 2022,
arXiv 2110.02861, section 2): a block is divided by its largest magnitude, and each quotient replaced by the index of the
nearest of 256 values. Comparisons, one division and one multiplication a number, all of them rounded alike everywhere: a
tensor has the same codes on every device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lingrad.errors import SpecError, require, require_one_of
from lingrad.optimizers.codes import BLOCK, BUCKET, Book, Kind, code_book, dequantize, quantize
from lingrad.tensors import TensorSpec

SMALLEST = 4096  # numbers of a tensor from which it is quantised, as in bitsandbytes (its min_8bit_size)
SCALES = ".scales"  # what follows an entry's name in that of its scales


Books = dict[tuple[bool, torch.device], "Book"]  # by sign and device; of one step, so that nothing of them stays in memory


@dataclass(frozen=True)
class Quantizer:
    """How the moments of one base are held between steps.

    Args:
        kind: Which values the codes stand for.
        smallest: Tensors of fewer numbers stay as they are.
        unsigned: Entries of the base that are never negative; the others have a sign.
    """

    kind: Kind
    smallest: int
    unsigned: frozenset[str] = frozenset()

    def takes(self, value: Any) -> bool:
        """Whether an entry is quantised: a floating-point tensor that is large enough."""
        return isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= self.smallest

    def encode(self, entries: Mapping[str, Any], books: Books | None = None) -> dict[str, Any]:
        """A base's entries for one parameter as they are held: codes under their names, scales beside them.

        Args:
            entries: The entries, as the base keeps them.
            books: Code books that were made already.

        Returns:
            Plain tensors, and whatever is not quantised.
        """
        held: dict[str, Any] = {}
        for key, value in entries.items():
            if self.takes(value):
                held[key], held[key + SCALES] = quantize(value, self._book(key, value.device, books))
            else:
                held[key] = value
        return held

    def decode(self, held: Mapping[str, Any], books: Books | None = None) -> dict[str, Any]:
        """The inverse of `encode`, to rounding.

        Args:
            held: What that gave.
            books: Code books that were made already.

        Returns:
            The entries in the base's own dtypes.
        """
        entries: dict[str, Any] = {}
        for key, value in held.items():
            if key + SCALES in held:
                entries[key] = dequantize(value, held[key + SCALES], self._book(key, value.device, books))
            elif not (key.endswith(SCALES) and key.removesuffix(SCALES) in held):
                entries[key] = value
        return entries

    def stored(self, kept: list[TensorSpec]) -> list[TensorSpec]:
        """What is held instead of a base's tensors, for the memory ledger."""
        held: list[TensorSpec] = []
        for tensor in kept:
            count = tensor.nbytes // tensor.dtype.itemsize
            if not tensor.dtype.is_floating_point or count < self.smallest:
                held.append(tensor)
            else:
                held += [TensorSpec(tensor.shape, torch.uint8), TensorSpec((-(-count // BLOCK),), tensor.dtype)]
        return held

    def _book(self, key: str, device: torch.device, books: Books | None) -> Book:
        books = {} if books is None else books
        signed = key not in self.unsigned
        if (signed, device) not in books:
            books[signed, device] = code_book(self.kind, signed=signed, device=device)
        return books[signed, device]


class QuantizedOptimizer(Optimizer):
    """A stock optimizer whose moments are decoded for its step, some parameters at a time, and encoded again after it.

    Args:
        stock: The optimizer, unmodified; its param groups are shared.
        quantizer: How its moments are held.
    """

    def __init__(self, stock: Optimizer, quantizer: Quantizer) -> None:
        self.stock = stock
        self.quantizer = quantizer
        super().__init__(stock.param_groups, stock.defaults)
        for param, entries in stock.state.items():
            self.state[param] = quantizer.encode(entries)
        stock.state = defaultdict(dict)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the stock optimizer.

        Args:
            closure: Evaluates the model and returns the loss, as in torch.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        books: Books = {}
        for group, params in self._buckets():
            part = {**group, "params": params}
            self.stock.param_groups = [part]
            held = {param: self.state[param] for param in params if self.state.get(param)}
            decoded = {param: self.quantizer.decode(entries, books) for param, entries in held.items()}
            self.stock.state = defaultdict(dict, decoded)
            try:
                self.stock.step()
                group.update({key: value for key, value in part.items() if key != "params"})
                for param, entries in self.stock.state.items():
                    self.state[param] = self.quantizer.encode(entries, books)
            finally:
                self.stock.param_groups, self.stock.state = self.param_groups, defaultdict(dict)
        return loss

    def _buckets(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Parameters with a gradient, as many of a group as do not exceed the bucket, but at least one."""
        for group in self.param_groups:
            bucket: list[Tensor] = []
            numbers = 0
            for param in group["params"]:
                if param.grad is None:
                    continue
                if bucket and numbers + param.numel() > BUCKET:
                    yield group, bucket
                    bucket, numbers = [], 0
                bucket.append(param)
                numbers += param.numel()
            if bucket:
                yield group, bucket


def find_quantizer(options: Mapping[str, Any], name: str, build: Callable[[list[Tensor]], Optimizer]) -> Quantizer | None:
    """Read the options ``moments`` and ``min_8bit_size``.

    Args:
        options: These two, as far as they were given.
        name: The base's name, for messages.
        build: Builds the base.

    Returns:
        How to hold its moments; None for as they are.

    Raises:
        SpecError: A value is wrong, or the base has no moments to quantise.
    """
    kind = options.get("moments")
    smallest = options.get("min_8bit_size", SMALLEST)
    if kind is None:
        require("min_8bit_size" not in options, "min_8bit_size", "min_8bit_size is of moments='8bit', which is not asked for")
        return None
    require_one_of(kind, get_args(Kind), "moments")
    fits = type(smallest) is int and smallest >= 2
    require(fits, "min_8bit_size", f"min_8bit_size must be a whole number, 2 or more, not {smallest!r}")
    entries = {key: value for key, value in _tried(name, build).items() if isinstance(value, Tensor) and value.numel() > 1}
    moments = {key: value for key, value in entries.items() if value.is_floating_point()}
    own = [key for key, value in entries.items() if value.dtype in (torch.uint8, torch.int8)]
    require(not own, "moments", f"base '{name}' keeps '{', '.join(own)}' in 8 bits by itself; leave moments out")
    require(bool(moments), "moments", f"base '{name}' keeps no moments with these options; leave moments='{kind}' out")
    return Quantizer(kind, smallest, frozenset(key for key, value in moments.items() if not bool((value < 0).any())))


def _tried(name: str, build: Callable[[list[Tensor]], Optimizer]) -> dict[str, Any]:
    """What a base keeps of a parameter after some steps on gradients of both signs."""
    param = nn.Parameter(torch.zeros(64, 64, device="cpu"))
    generator = torch.Generator().manual_seed(0)
    optimizer = build([param])
    try:
        for _ in range(3):
            param.grad = torch.randn(param.shape, generator=generator, device="cpu")
            optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"base '{name}' cannot be used: its step(), without a closure, failed with: {error}") from error
    return dict(optimizer.state[param])
