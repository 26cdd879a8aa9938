"""Linear weights that bitsandbytes holds in 4 or 8 bits: read as a matrix, written back, decayed, in place.

A layer is recognised by its class's name and module; bitsandbytes is imported when a weight is read or written, by which time
it is loaded, since the layer is its own.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from lingrad._typing import override
from lingrad.errors import ModeError, optional

FULL = 127.0  # the largest code of an 8-bit weight


class MergeLoss(NamedTuple):
    """What merges into a quantised weight have lost: W + S z that is to be quantised again is rounded.

    Args:
        merges: How many there were.
        last: |what is lost|_F / |S z|_F of the last one; what was kept in the new coordinates is not lost.
        total: The same of all, by sums of squares.
        lost_squares: The sum of what is lost.
        changed_squares: The sum of what was merged.
    """

    merges: int = 0
    last: float = 0.0
    total: float = 0.0
    lost_squares: float = 0.0
    changed_squares: float = 0.0

    def plus(self, lost: float, changed: float) -> MergeLoss:
        """One more merge, of a change of norm ``changed``."""
        a, b = self.lost_squares + lost**2, self.changed_squares + changed**2
        return MergeLoss(self.merges + 1, lost / changed, (a / b) ** 0.5, a, b)


class Packed(ABC):
    """The quantised weight of one layer.

    Args:
        module: The layer.
        name: The weight's name, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        self.name = name

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is held in: ``nf4``, ``fp4`` or ``int8``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype it was quantised from."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight [m, n], a new tensor in float32."""

    @abstractmethod
    def write(self, matrix: Tensor) -> None:
        """Quantise a matrix [m, n], float32, into the memory of the weight."""

    @abstractmethod
    def scales(self) -> list[Tensor]:
        """What a factor of the weight is a factor of."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that make the weight, by name; who writes into all of them has set it."""

    @abstractmethod
    def entries(self, matrix: Tensor) -> dict[str, Tensor]:
        """What the layer's ``state_dict`` would hold if the weight were a matrix [m, n], float32: key -> tensor."""

    @abstractmethod
    def take(self, entries: dict[str, Any]) -> list[str]:
        """Take over entries of a ``state_dict``, which bitsandbytes itself cannot load into a layer that is quantised.

        Args:
            entries: Key, without the layer's prefix, -> tensor.

        Returns:
            The keys that are done with; ``weight`` is left to torch.
        """

    def tensors(self) -> list[Tensor]:
        """All tensors in memory, code books included."""
        return list(self.state().values())

    def open(self) -> Any:
        """Have the weight stay in the layout it is trained in.

        Returns:
            What `close` needs.
        """
        return None

    def close(self, opened: Any) -> None:  # noqa: B027 - nothing to undo in most
        """Undo `open`."""


@final
class FourBit(Packed):
    """The weight of a ``Linear4bit``: two codes in a byte, a scale for each block, which may be quantised itself."""

    @property
    def _weight(self) -> Any:
        return self.module.weight

    @property
    def _quant(self) -> Any:
        found = getattr(self._weight, "quant_state", None) or getattr(self.module, "quant_state", None)
        return found if found is not None else _not_yet(self.name)

    @property
    @override
    def kind(self) -> str:
        return str(self._weight.quant_type)

    @property
    @override
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._quant.dtype
        return dtype

    @override
    def dense(self) -> Tensor:
        wide = copy.copy(self._quant)
        wide.dtype = torch.float32  # the codes' values and scales are; rounding them to the layer's dtype is the forward's
        matrix: Tensor = _functional().dequantize_4bit(self._weight.data.view(-1, 1), wide)
        return matrix

    @override
    def write(self, matrix: Tensor) -> None:
        codes, quant = self._quantized(matrix)
        self._weight.data.copy_(codes.view(self._weight.shape))
        self._copy(quant)

    @override
    def scales(self) -> list[Tensor]:
        quant = self._quant
        return [quant.state2.absmax, quant.offset] if quant.nested else [quant.absmax]

    @override
    def state(self) -> dict[str, Tensor]:
        quant = self._quant
        nested = {"offset": quant.offset, "nested_absmax": quant.state2.absmax} if quant.nested else {}
        return {"weight": self._weight.data, "absmax": quant.absmax, **nested}

    @override
    def tensors(self) -> list[Tensor]:
        quant = self._quant
        return [*self.state().values(), quant.code, *([quant.state2.code] if quant.nested else [])]

    @override
    def entries(self, matrix: Tensor) -> dict[str, Tensor]:
        codes, quant = self._quantized(matrix)
        quant.dtype = self.dtype
        packed = quant.as_dict(packed=True)
        return {"weight": codes.view(self._weight.shape), **{f"weight.{key}": value for key, value in packed.items()}}

    @override
    def take(self, entries: dict[str, Any]) -> list[str]:
        own = {key: value for key, value in entries.items() if key.startswith("weight.")}
        if own:
            found = {key.removeprefix("weight."): value for key, value in own.items()}
            self._copy(type(self._quant).from_dict(found, self._weight.device))
        return list(own)

    @override
    def open(self) -> Any:
        # in a forward without gradients on some CPUs the layer is repacked for good, its scales rounded anew
        if getattr(self._quant, "packing_format_for_cpu", False):
            data, quant = _functional()._convert_weight_packed_for_cpu_inverse(self._weight.data, self._quant)
            self._weight.data, self._weight.quant_state = data, quant
        before = getattr(self.module, "support_avx512bf16_for_cpu", None)
        if before is not None:
            self.module.support_avx512bf16_for_cpu = False
        return before

    @override
    def close(self, opened: Any) -> None:
        if opened is not None:
            self.module.support_avx512bf16_for_cpu = opened

    def _quantized(self, matrix: Tensor) -> tuple[Tensor, Any]:
        quant = self._quant
        found: tuple[Tensor, Any] = _functional().quantize_4bit(
            matrix.contiguous(),
            blocksize=quant.blocksize,
            compress_statistics=quant.nested,
            quant_type=quant.quant_type,
            quant_storage=self._weight.dtype,
        )
        return found

    def _copy(self, other: Any) -> None:
        """Take over the scales of another state of the same kind; codes are the weight's data."""
        quant = self._quant
        quant.absmax.copy_(other.absmax)
        if quant.nested:
            quant.offset.copy_(other.offset)
            quant.state2.absmax.copy_(other.state2.absmax)


@final
class EightBit(Packed):
    """The weight of a ``Linear8bitLt``: a code in -127 to 127 for every number, a scale for each row."""

    @property
    def _weight(self) -> Any:
        return self.module.weight

    @property
    def _row_scales(self) -> Tensor:
        held = (getattr(self.module.state, "SCB", None), getattr(self._weight, "SCB", None))
        found: Tensor | None = next((scales for scales in held if scales is not None), None)
        return found if found is not None and self._weight.dtype == torch.int8 else _not_yet(self.name)

    @property
    @override
    def kind(self) -> str:
        return "int8"

    @property
    @override
    def dtype(self) -> torch.dtype:
        return torch.float16  # to which bitsandbytes casts before it quantises

    @override
    def dense(self) -> Tensor:
        codes: Tensor = self._weight.data
        return codes.float() * (self._row_scales.float() / FULL)[:, None]

    @override
    def write(self, matrix: Tensor) -> None:
        codes, scales = self._quantized(matrix)
        self._weight.data.copy_(codes)
        self._row_scales.copy_(scales)
        self._follow()

    @override
    def scales(self) -> list[Tensor]:
        return [self._row_scales]

    @override
    def state(self) -> dict[str, Tensor]:
        self._follow()
        return {"weight": self._weight.data, "scales": self._row_scales}

    @override
    def entries(self, matrix: Tensor) -> dict[str, Tensor]:
        codes, scales = self._quantized(matrix)
        return {"weight": codes, "SCB": scales}

    @override
    def take(self, entries: dict[str, Any]) -> list[str]:
        if "SCB" not in entries:
            return []
        self._row_scales.copy_(entries["SCB"])
        self._follow()
        return ["SCB", "weight_format"]

    def _follow(self) -> None:
        """The layer holds its codes under three names, one tensor; after a move some are another."""
        state = self.module.state
        for owner in (state, self._weight):
            if owner.CB is not None and owner.CB.data_ptr() != self._weight.data.data_ptr():
                owner.CB = self._weight.data

    def _quantized(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        scales = matrix.abs().amax(dim=1)
        divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
        return (matrix * (FULL / divisors)[:, None]).round_().clamp_(-FULL, FULL).to(torch.int8), scales


_CLASSES: dict[str, type[Packed]] = {"Linear4bit": FourBit, "Linear8bitLt": EightBit}


def is_packed(module: nn.Module | None) -> bool:
    """Whether a layer holds a quantised weight, as bitsandbytes' layers for 4 and 8 bits do."""
    return _class_of(module) is not None and not getattr(getattr(module, "weight", None), "has_fp16_weights", False)


def packed_of(module: nn.Module, name: str) -> Packed:
    """The quantised weight of a layer.

    Args:
        module: One for which `is_packed` holds.
        name: The weight's name, for messages.

    Returns:
        The weight.

    Raises:
        ModeError: The layer is not quantised yet.
    """
    found = _class_of(module)
    if found is None:
        raise ModeError(f"{name} belongs to a {type(module).__name__}, which holds no weight in 4 or 8 bits")
    weight = found(module, name)
    weight.scales()
    return weight


def _class_of(module: nn.Module | None) -> type[Packed] | None:
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] == "bitsandbytes" and cls.__name__ in _CLASSES:
            return _CLASSES[cls.__name__]
    return None


def _not_yet(name: str) -> Any:
    raise ModeError(
        f"{name} is of a layer for 4 or 8 bits that is not quantised yet; move the model to its device first, model.to('cpu') "
        "or model.to('cuda'), which is when bitsandbytes quantises it"
    )


def _functional() -> Any:
    return optional("bitsandbytes.functional", "a weight in 4 or 8 bits", "bnb")
