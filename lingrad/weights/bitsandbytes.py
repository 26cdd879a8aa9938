"""Weights in 4 or 8 bits in layers of bitsandbytes, which is imported when a weight is first read or written."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import ModeError, optional
from lingrad.weights.layout import packed_kind
from lingrad.weights.packed import PackedWeight
from lingrad.weights.rounding import FULL, Rounding


@final
class FourBit(PackedWeight):
    """The weight of a ``Linear4bit``: two codes in a byte, a scale for each block, which may be quantised itself."""

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
    def parts(self) -> dict[str, Tensor]:
        quant = self._quant
        nested = {"offset": quant.offset, "nested_absmax": quant.state2.absmax} if quant.nested else {}
        return {"weight": self._weight.data, "absmax": quant.absmax, **nested}

    @override
    def tensors(self) -> list[Tensor]:
        quant = self._quant
        return [*self.parts().values(), quant.code, *([quant.state2.code] if quant.nested else [])]

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
        # in a forward without gradients on some CPUs the layer is repacked permanently, its scales rounded again
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
class EightBit(PackedWeight):
    """The weight of a ``Linear8bitLt``: a code in -127 to 127 for every number, a scale for each row."""

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
    def require_rounding(self) -> None:
        pass

    @override
    def write_rounded(self, matrix: Tensor, rounding: Rounding) -> None:
        before = self._row_scales.float()[:, None]
        matrix.add_(rounding.kept(before))
        scales = _row_scales(matrix)
        rounding.encode_(self._weight.data, matrix, torch.where(scales > 0, scales, torch.ones_like(scales))[:, None])
        self._row_scales.copy_(scales)
        self._follow()

    @override
    def scales(self) -> list[Tensor]:
        return [self._row_scales]

    @override
    def parts(self) -> dict[str, Tensor]:
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
        scales = _row_scales(matrix)
        divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
        return (matrix * (FULL / divisors)[:, None]).round_().clamp_(-FULL, FULL).to(torch.int8), scales


def _row_scales(matrix: Tensor) -> Tensor:
    """The largest magnitude of each row, without a copy of the matrix."""
    return torch.maximum(matrix.amax(dim=1), -matrix.amin(dim=1))


def _not_yet(name: str) -> Any:
    raise ModeError(
        f"{name} is of a layer for 4 or 8 bits that is not quantised yet; move the model to its device first, model.to('cpu') "
        "or model.to('cuda'), which is when bitsandbytes quantises it"
    )


def _functional() -> Any:
    return optional("bitsandbytes.functional", "a weight in 4 or 8 bits", "bnb")


def packed_of(module: nn.Module, name: str) -> PackedWeight:
    """The quantised weight of a layer.

    Args:
        module: One for which `is_packed` holds.
        name: The weight's name, for messages.

    Returns:
        The weight.

    Raises:
        ModeError: The layer is not quantised yet.
    """
    classes: dict[str, type[PackedWeight]] = {"Linear4bit": FourBit, "Linear8bitLt": EightBit}
    kind = packed_kind(module)
    if not kind:
        raise ModeError(f"{name} belongs to a {type(module).__name__}, which holds no weight in 4 or 8 bits")
    weight = classes[kind](module, name)
    weight.scales()
    return weight
