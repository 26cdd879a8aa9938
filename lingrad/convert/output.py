"""What every conversion writes, and how: the options that all of them share, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lingrad.console import Tick
from lingrad.convert.lowrank import Goal
from lingrad.errors import require
from lingrad.files.atomic import refuse_existing
from lingrad.peft.card import check_base_model
from lingrad.peft.fit import check_allowed, check_target
from lingrad.peft.loaders import Target

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Output:
    """What every conversion writes, and how.

    Args:
        out: The adapter's folder.
        goal: How much of each change.
        dtype: Of the factors, a key of ``DTYPES``.
        uniform_rank: Whether all weights get the largest rank.
        logits: Whether to compare logits.
        decayed_start: Where to write the starting model with decay applied.
        target: What is to load the adapter.
        allow_residual: The largest residual of a weight to accept; None for what needs no permission.
        base_model: What others know the starting model by; None for its folder.
        tick: Called after each tensor.

    Raises:
        DataError: A folder to write exists.
        SpecError: The dtype is unknown, or a folder is inside the other.
    """

    out: Path
    goal: Goal
    dtype: str | None = None
    uniform_rank: bool = False
    logits: bool = False
    decayed_start: Path | None = None
    target: Target = "peft"
    allow_residual: float | None = None
    base_model: str | None = None
    tick: Tick | None = None

    def __post_init__(self) -> None:
        """Check the dtype and the folders."""
        require(
            self.dtype is None or self.dtype in DTYPES, "dtype", f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}"
        )
        check_target(self.target)
        check_allowed(self.allow_residual)
        check_base_model(self.base_model)
        refuse_existing(self.out)
        if self.decayed_start is None:
            return
        refuse_existing(self.decayed_start)
        a, b = self.out.resolve(), self.decayed_start.resolve()
        apart = a != b and a not in b.parents and b not in a.parents
        require(
            apart, "decayed_start", f"one of '{self.out}' and '{self.decayed_start}' is inside the other; name separate folders"
        )

    def factor_dtype(self, weight: torch.dtype) -> torch.dtype:
        """The dtype of the factors of a weight of some dtype."""
        if self.dtype is not None:
            return DTYPES[self.dtype]
        return torch.float64 if weight == torch.float64 else torch.float32
