"""The base optimizers that have names: where each lives, and its row in the memory ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from lingrad.tensors import TensorSpec, wide

# Shape, dtype and the base's options -> what it keeps of such a parameter on CUDA
Row = Callable[[tuple[int, ...], torch.dtype, Mapping[str, Any]], list[TensorSpec]]


@dataclass(frozen=True)
class Stock:
    """Where a named base lives, and the options that make it fit."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: str = "all"
    fallback: str | None = None  # the base for parameters this one cannot step
    moments: Row | None = None  # its row in the memory ledger


def _adam(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    kept = [TensorSpec(shape, dtype)] * (3 if options.get("amsgrad") else 2)
    fused = options.get("fused", not ({"foreach", "differentiable"} & options.keys())) or options.get("capturable")
    return [*kept, TensorSpec((), torch.float32)] if fused else kept  # otherwise the step is counted on the CPU


def _sgd(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    return [TensorSpec(shape, dtype)] if options.get("momentum") else []


def _rmsprop(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    kept = [TensorSpec(shape, dtype)] * (1 + bool(options.get("momentum")) + bool(options.get("centered")))
    return [*kept, TensorSpec((), torch.float32)] if options.get("capturable") else kept


def _one(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    return [TensorSpec(shape, dtype)]


def _adafactor(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    dtype = wide(dtype)
    mean = [TensorSpec(shape, dtype)] if options.get("beta1") is not None else []
    squares = [shape] if len(shape) < 2 else [shape[:-1], (*shape[:-2], shape[-1])]
    return [*mean, *(TensorSpec(part, dtype) for part in squares), TensorSpec((), dtype)]  # the last is the parameter's RMS


def _adamw8bit(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    count = prod(shape)
    if count < options.get("min_8bit_size", 4096):
        return [TensorSpec(shape, torch.float32)] * 2
    blocks = -(-count // 256)
    return [TensorSpec(shape, torch.uint8), TensorSpec((blocks,), torch.float32)] * 2


STOCK: dict[str, Stock] = {
    "adamw": Stock("torch.optim.AdamW", moments=_adam),
    "adam": Stock("torch.optim.Adam", moments=_adam),
    "sgd": Stock("torch.optim.SGD", moments=_sgd),
    "rmsprop": Stock("torch.optim.RMSprop", moments=_rmsprop),
    "adagrad": Stock("torch.optim.Adagrad", moments=_one),
    # Muon steps matrices only; its update is rescaled to AdamW's so that one learning rate serves both.
    "muon": Stock("torch.optim.Muon", {"adjust_lr_fn": "match_rms_adamw"}, fallback="adamw", moments=_one),
    "lion": Stock("lion_pytorch.Lion", extra="lion", moments=_one),
    "adafactor": Stock(
        "transformers.optimization.Adafactor",
        {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "warmup_init": False},
        extra="hf",
        moments=_adafactor,
    ),
    "adamw8bit": Stock("bitsandbytes.optim.AdamW8bit", extra="bnb", moments=_adamw8bit),
}
