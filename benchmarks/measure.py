"""Timing: pieces of work in turn, A B C A B C, and what their times say of each other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lingrad.tensors import nbytes


def synchronized() -> float:
    """The time, when all that was asked of the device is done, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    started = synchronized()
    work()
    return synchronized() - started


def in_turn(works: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1) -> dict[str, list[float]]:
    """Time some pieces of work in turn.

    Args:
        works: Key -> work.
        rounds: How often each is timed.
        warm_up: How often each is run before.

    Returns:
        Key -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {key: [] for key in works}
    for number in range(warm_up + rounds):
        for key, work in works.items():
            taken = timed(work)
            if number >= warm_up:
                seconds[key].append(taken)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios.

    Args:
        middle: The median.
        low: The lower quartile.
        high: The upper quartile.
    """

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(these: Sequence[float], those: Sequence[float]) -> Ratio:
    """The median of ratios of times that were taken in the same round, with their quartiles."""
    paired = [a / b for a, b in zip(these, those, strict=True)]
    low, _, high = quantiles(paired, n=4) if len(paired) > 1 else (paired * 3)
    return Ratio(median(paired), low, high)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, each of its tensors once: the least that unfused kernels move."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            self.nbytes += nbytes(*tensors.values())
        return out


def say(line: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()
