"""Changes made to fit what a loader reads: one rank for all, at most what it has room for, and nothing but factors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from lingrad.errors import ExportError, require, require_one_of
from lingrad.maps.factors import Factors, compress, padded
from lingrad.peft.check import judge, open_adapter_file, require_loads, scale_faults
from lingrad.peft.loaders import LOADERS, TARGETS, VLLM_RANKS, Target


def check_target(target: str) -> None:
    """Make sure that a target is known; raises `SpecError` where it is not."""
    require_one_of(target, TARGETS, "target")


def check_allowed(allow_residual: object) -> None:
    """Make sure that a residual to accept is a number from 0, or None; raises `SpecError` where it is not."""
    bounded = isinstance(allow_residual, int | float) and type(allow_residual) is not bool and allow_residual >= 0
    require(
        allow_residual is None or bounded, "allow_residual", f"allow_residual must be a number from 0, not {allow_residual!r}"
    )


def rounded_up(residual: float) -> str:
    """A residual with two digits, not below it, so that what a message says to allow is enough."""
    scale = 10.0 ** (math.floor(math.log10(residual)) - 1) if 0 < residual < math.inf else 1.0
    return f"{math.ceil(residual / scale * (1 - 1e-12)) * scale:.2g}" if math.isfinite(residual) else str(residual)


def largest_rank(target: Target, rank: int | None) -> int | None:
    """The largest rank that an adapter may have.

    Args:
        target: What it is for.
        rank: The largest that was asked for.

    Returns:
        The largest; None without a limit.
    """
    limits = [limit for limit in (rank, VLLM_RANKS[-1] if target == "vllm" else None) if limit is not None]
    return min(limits, default=None)


def same_rank(ranks: Mapping[str, int]) -> dict[str, int]:
    """One rank for all, the largest.

    Args:
        ranks: Parameter -> rank of its change.

    Returns:
        Parameter -> rank of its factors.
    """
    return dict.fromkeys(ranks, max(ranks.values(), default=0))


def limited(factors: Factors, rank: int | None) -> Factors:
    """A change with no more columns than it needs.

    Args:
        factors: The change.
        rank: The largest rank; None for the largest that a matrix of this shape has.

    Returns:
        The same object where it has no more columns.
    """
    most = min(*factors.shape, *([] if rank is None else [rank]))
    return factors if factors.rank <= most else compress(factors, rank=rank)[0]


def fitted(target: Target, changes: Mapping[str, Factors]) -> dict[str, Factors]:
    """Changes with the ranks to write: for PEFT each its own, for other loaders one for all, by columns of zeros.

    Args:
        target: What the adapter is for.
        changes: Parameter -> its change.

    Returns:
        Parameter -> the same change.
    """
    if target == "peft":
        return dict(changes)
    ranks = same_rank({name: factors.rank for name, factors in changes.items()})
    return {name: padded(factors, ranks[name]) for name, factors in changes.items()}


def refuse_full(target: Target, full: Collection[str]) -> None:
    """Make sure that nothing is saved in full for a loader that reads nothing but factors.

    Args:
        target: What the adapter is for.
        full: Names of what would be saved in full.

    Raises:
        ExportError: Something would be.
    """
    if target == "peft" or not full:
        return
    first, *more = full
    raise ExportError(
        f"{LOADERS[target].title} loads nothing but factors, and '{first}'{f' and {len(more)} more' if more else ''} would be "
        "saved in full. Train what is transformed and nothing else, with train_only='transformed'; or export for PEFT, merge "
        "(lingrad merge) and serve the model"
    )


def check_written(folder: Path, target: Target) -> tuple[list[str], list[str]]:
    """Make sure that an adapter's target loads it as PEFT does.

    Args:
        folder: The adapter's folder.
        target: What it is for.

    Returns:
        Warnings, and notes: for ``peft`` the first say which other loaders would change the adapter without an error; for other
        targets there are none, and a note says how to load it.

    Raises:
        ExportError: The target refuses or changes it.
    """
    adapter = open_adapter_file(folder)
    if target == "peft":
        found = scale_faults(adapter).items()
        return [f"{sentence}. target={loader!r} writes an adapter that it loads as it is" for loader, sentence in found], []
    finding = judge(LOADERS[target], adapter, "DIR")
    require_loads(finding, "the adapter", "Leave these weights out by a rule, or export for PEFT, merge and serve the model")
    return [], [f"for {LOADERS[target].title}: {finding.command}"]
