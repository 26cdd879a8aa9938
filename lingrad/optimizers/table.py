"""The base optimizers that have names: where each is defined, and its state as the memory estimate counts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from lingrad.tensors import TensorSpec, wide

# Shape, dtype and the base's options -> the optimizer state of such a parameter on CUDA
StateRow = Callable[[tuple[int, ...], torch.dtype, Mapping[str, Any]], list[TensorSpec]]


@dataclass(frozen=True)
class BuiltIn:
    """Where a named base is defined, and the options that make it read only gradients."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: str = "all"
    fallback: str | None = None  # the base that steps the parameters that train in full, where this one cannot
    moments: StateRow | None = None  # in the memory estimate


def _adam(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    moments = [TensorSpec(shape, dtype)] * (3 if options.get("amsgrad") else 2)
    fused = options.get("fused", not ({"foreach", "differentiable"} & options.keys())) or options.get("capturable")
    return [*moments, TensorSpec((), torch.float32)] if fused else moments  # otherwise the step is counted on the CPU


def _sgd(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    return [TensorSpec(shape, dtype)] if options.get("momentum") else []


def _rmsprop(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
    moments = [TensorSpec(shape, dtype)] * (1 + bool(options.get("momentum")) + bool(options.get("centered")))
    return [*moments, TensorSpec((), torch.float32)] if options.get("capturable") else moments


def _one_moment(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> list[TensorSpec]:
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


BUILT_IN: dict[str, BuiltIn] = {
    "adamw": BuiltIn("torch.optim.AdamW", moments=_adam),
    "adam": BuiltIn("torch.optim.Adam", moments=_adam),
    "sgd": BuiltIn("torch.optim.SGD", moments=_sgd),
    "rmsprop": BuiltIn("torch.optim.RMSprop", moments=_rmsprop),
    "adagrad": BuiltIn("torch.optim.Adagrad", moments=_one_moment),
    # Muon steps matrices only; its update is scaled like AdamW's, so that both can have one learning rate.
    "muon": BuiltIn("torch.optim.Muon", {"adjust_lr_fn": "match_rms_adamw"}, fallback="adamw", moments=_one_moment),
    "lion": BuiltIn("lion_pytorch.Lion", extra="lion", moments=_one_moment),
    "adafactor": BuiltIn(
        "transformers.optimization.Adafactor",
        {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "warmup_init": False},
        extra="hf",
        moments=_adafactor,
    ),
    "adamw8bit": BuiltIn("bitsandbytes.optim.AdamW8bit", extra="bnb", moments=_adamw8bit),
}
