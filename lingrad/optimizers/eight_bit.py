"""8-bit moments for any base, in plain torch: between steps an element is stored as one byte, with a scale for every 256.

The scheme is that of block-wise quantization (Dettmers et al., ICLR 2022, arXiv 2110.02861); see `lingrad.optimizers.codes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lingrad.errors import SpecError, require, require_one_of
from lingrad.optimizers.closure import evaluate
from lingrad.optimizers.codes import BLOCK, BUCKET, PLAIN, CodeBook, CodeKind, Coding, code_book, dequantize, quantize
from lingrad.tensors import TensorSpec

SMALLEST = 4096  # elements; a smaller tensor is not quantised, as in bitsandbytes (its min_8bit_size)
SCALES = ".scales"  # suffix of the name of an entry's scales

Books = dict[tuple[bool, torch.device], CodeBook]  # by sign and device; made for one step, so that none stays in memory


@dataclass(frozen=True)
class Quantizer:
    """How the moments of one base are stored between steps.

    Args:
        kind: The kind of the code book.
        smallest: Tensors with fewer elements are not quantised.
        unsigned: Entries of the base that are never negative; the others have a sign.
        coding: The functions that encode and decode.
    """

    kind: CodeKind
    smallest: int
    unsigned: frozenset[str] = frozenset()
    coding: Coding = field(default=PLAIN, compare=False)

    def compiled(self, options: Mapping[str, Any]) -> Quantizer:
        """The same, encoding and decoding through ``torch.compile``, whose options are given."""
        return replace(self, coding=PLAIN.compiled(options))

    def takes(self, value: Any) -> bool:
        """Whether an entry is quantised: a floating-point tensor that is large enough."""
        return isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= self.smallest

    def encode(self, entries: Mapping[str, Any], books: Books | None = None) -> dict[str, Any]:
        """The optimizer state of one parameter as it is stored: codes under the entries' names, and scales next to them.

        Args:
            entries: The state, as the base has it.
            books: Code books to use; missing ones are added.

        Returns:
            Plain tensors, and the entries that are not quantised.
        """
        encoded: dict[str, Any] = {}
        for key, value in entries.items():
            if self.takes(value):
                encoded[key], encoded[key + SCALES] = quantize(value, self._book(key, value.device, books), self.coding)
            else:
                encoded[key] = value
        return encoded

    def decode(self, encoded: Mapping[str, Any], books: Books | None = None) -> dict[str, Any]:
        """The inverse of `encode`, up to rounding.

        Args:
            encoded: A result of `encode`.
            books: Code books to use; missing ones are added.

        Returns:
            The entries in the base's own dtypes.
        """
        entries: dict[str, Any] = {}
        for key, value in encoded.items():
            if key + SCALES in encoded:
                entries[key] = dequantize(value, encoded[key + SCALES], self._book(key, value.device, books), self.coding)
            elif not (key.endswith(SCALES) and key.removesuffix(SCALES) in encoded):
                entries[key] = value
        return entries

    def encoded_specs(self, state: list[TensorSpec]) -> list[TensorSpec]:
        """The tensors that are stored in place of a base's own, for the memory estimate."""
        encoded: list[TensorSpec] = []
        for tensor in state:
            count = tensor.nbytes // tensor.dtype.itemsize
            if not tensor.dtype.is_floating_point or count < self.smallest:
                encoded.append(tensor)
            else:
                encoded += [TensorSpec(tensor.shape, torch.uint8), TensorSpec((-(-count // BLOCK),), tensor.dtype)]
        return encoded

    def _book(self, key: str, device: torch.device, books: Books | None) -> CodeBook:
        books = {} if books is None else books
        signed = key not in self.unsigned
        if (signed, device) not in books:
            books[signed, device] = code_book(self.kind, signed=signed, device=device)
        return books[signed, device]


class QuantizedOptimizer(Optimizer):
    """An optimizer whose moments are decoded for its step, some parameters at a time, and encoded again after it.

    Args:
        base: The optimizer, unmodified; its param groups are shared.
        quantizer: How its moments are stored.
    """

    def __init__(self, base: Optimizer, quantizer: Quantizer) -> None:
        self.base = base
        self.quantizer = quantizer
        super().__init__(base.param_groups, base.defaults)
        for param, entries in base.state.items():
            self.state[param] = quantizer.encode(entries)
        base.state = defaultdict(dict)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer.

        Args:
            closure: Evaluates the model and returns the loss, as in torch.

        Returns:
            What the closure returned.
        """
        loss = evaluate(closure)
        books: Books = {}
        for group, params in self._buckets():
            part = {**group, "params": params}
            self.base.param_groups = [part]
            encoded = {param: self.state[param] for param in params if self.state.get(param)}
            decoded = {param: self.quantizer.decode(entries, books) for param, entries in encoded.items()}
            self.base.state = defaultdict(dict, decoded)
            try:
                self.base.step()
                group.update({key: value for key, value in part.items() if key != "params"})
                for param, entries in self.base.state.items():
                    self.state[param] = self.quantizer.encode(entries, books)
            finally:
                self.base.param_groups, self.base.state = self.param_groups, defaultdict(dict)
        return loss

    def _buckets(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Parameters with a gradient: at a time as many of one group as have `BUCKET` elements or fewer, but at least one."""
        for group in self.param_groups:
            bucket: list[Tensor] = []
            elements = 0
            for param in group["params"]:
                if param.grad is None:
                    continue
                if bucket and elements + param.numel() > BUCKET:
                    yield group, bucket
                    bucket, elements = [], 0
                bucket.append(param)
                elements += param.numel()
            if bucket:
                yield group, bucket


def find_quantizer(options: Mapping[str, Any], name: str, build: Callable[[list[Tensor]], Optimizer]) -> Quantizer | None:
    """Read the options ``moments`` and ``min_8bit_size``.

    Args:
        options: These two, if given.
        name: The base's name, for messages.
        build: Builds the base.

    Returns:
        How to store its moments; None means unquantised.

    Raises:
        SpecError: A value is wrong, or the base has no moments to quantise.
    """
    kind = options.get("moments")
    smallest = options.get("min_8bit_size", SMALLEST)
    if kind is None:
        require(
            "min_8bit_size" not in options, "min_8bit_size", "min_8bit_size is an option of moments='8bit', which is not set"
        )
        return None
    require_one_of(kind, get_args(CodeKind), "moments")
    fits = type(smallest) is int and smallest >= 2
    require(fits, "min_8bit_size", f"min_8bit_size must be a whole number, 2 or more, not {smallest!r}")
    entries = {
        key: value for key, value in _dry_run_state(name, build).items() if isinstance(value, Tensor) and value.numel() > 1
    }
    moments = {key: value for key, value in entries.items() if value.is_floating_point()}
    own = [key for key, value in entries.items() if value.dtype in (torch.uint8, torch.int8)]
    require(not own, "moments", f"base '{name}' stores '{', '.join(own)}' in 8 bits already; leave moments out")
    require(bool(moments), "moments", f"base '{name}' has no moments with these options; leave moments='{kind}' out")
    return Quantizer(kind, smallest, frozenset(key for key, value in moments.items() if not bool((value < 0).any())))


def _dry_run_state(name: str, build: Callable[[list[Tensor]], Optimizer]) -> dict[str, Any]:
    """The optimizer state of a parameter after a few steps on gradients of both signs."""
    param = nn.Parameter(torch.zeros(64, 64, device="cpu"))
    generator = torch.Generator().manual_seed(0)
    optimizer = build([param])
    try:
        for _ in range(3):
            param.grad = torch.randn(param.shape, generator=generator, device="cpu")
            optimizer.step()
    except Exception as error:  # other code
        why = str(error) or type(error).__name__
        raise SpecError(f"base '{name}' cannot be used: its step(), without a closure, failed with: {why}") from error
    return dict(optimizer.state[param])
