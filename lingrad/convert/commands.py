"""The conversions as the command line runs them: with a progress bar, and a text to print."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lingrad.console import progress
from lingrad.convert.merge import merge as merge_
from lingrad.convert.models import convert as convert_
from lingrad.convert.run import convert_run
from lingrad.errors import SpecError


@dataclass(frozen=True)
class Asked:
    """The options of ``lingrad convert``.

    Args:
        out: The adapter's folder.
        rank: See `lingrad.convert.convert`.
        energy: See there.
        max_error: See there.
        dtype: See there.
        uniform_rank: See there.
        full_svd: See there.
        logits: See there.
        decayed_base: See there.
        exact: Whether the folder is that of a run with a ledger.
    """

    out: Path | None = None
    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    dtype: str | None = None
    uniform_rank: bool = False
    full_svd: bool = False
    logits: bool = False
    decayed_base: Path | None = None
    exact: bool = False


def convert(base: Path, tuned: Path | None, asked: Asked) -> str:
    """Convert, and tell what was found.

    Args:
        base: The base model's folder; of the run, where it is to be exact.
        tuned: The tuned model's folder.
        asked: The options.

    Returns:
        A table.

    Raises:
        SpecError: Something is missing, or has no effect.
    """
    if asked.out is None:
        raise SpecError("say where the adapter shall be written: --out DIR", option="out")
    if asked.exact:
        return _convert_run(base if tuned is None else tuned, None if tuned is None else base, asked)
    if tuned is None:
        raise SpecError(
            "two folders are needed, BASE and TUNED; one is enough where it is the checkpoint of a lingrad run with "
            "ledger=True: --exact",
            option="tuned",
        )
    started = time.perf_counter()
    with progress("converting", "tensor", least=100) as tick:
        report = convert_(
            base,
            tuned,
            asked.out,
            rank=asked.rank,
            energy=asked.energy,
            max_error=asked.max_error,
            dtype=asked.dtype,
            uniform_rank=asked.uniform_rank,
            full_svd=asked.full_svd,
            logits=asked.logits,
            decayed_base=asked.decayed_base,
            tick=tick,
        )
    return f"{report.table()}\nWritten: {asked.out}, in {time.perf_counter() - started:.0f} s"


def _convert_run(run: Path, base: Path | None, asked: Asked) -> str:
    for option in ("energy", "max_error", "full_svd"):
        value = getattr(asked, option)
        if value is not None and value is not False:  # 0.0 was given too
            name = option.replace("_", "-")
            raise SpecError(f"--{name} has no effect with --exact, which reads what the run kept; leave it out", option=option)
    with progress("converting", "tensor", least=100) as tick:
        report = convert_run(
            run,
            asked.out or "",
            base=base,
            rank=asked.rank,
            dtype=asked.dtype,
            uniform_rank=asked.uniform_rank,
            logits=asked.logits,
            decayed_base=asked.decayed_base,
            tick=tick,
        )
    return f"{report.table()}\nWritten: {asked.out}"


def merge(base: Path, adapter: Path, out: Path) -> str:
    """Merge, and tell where.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        out: The merged model's folder.

    Returns:
        A line.
    """
    with progress("merging", "tensor", least=100) as tick:
        merge_(base, adapter, out, tick=tick)
    return f"Written: {out}"
