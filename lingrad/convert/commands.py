"""The conversions with a progress bar, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingrad.console import progress
from lingrad.convert import models, run
from lingrad.convert.merge import merge as merge_
from lingrad.peft.check import check_adapter as check_adapter
from lingrad.peft.report import AdapterReport


def convert(start: Path, tuned: Path, out: Path, **options: Any) -> AdapterReport:
    """`lingrad.convert.convert` with a progress bar.

    Args:
        start: The starting model's folder.
        tuned: The tuned model's folder.
        out: The adapter's folder.
        **options: See `lingrad.convert.convert`.

    Returns:
        The report.
    """
    with progress("converting", "tensor", least=100) as tick:
        return models.convert(start, tuned, out, tick=tick, **options)


def export(checkpoint: Path, out: Path, *, start: Path | None = None, **options: Any) -> AdapterReport:
    """`lingrad.convert.convert_run` with a progress bar.

    Args:
        checkpoint: The checkpoint's folder.
        out: The adapter's folder.
        start: The folder of the model that the run started from.
        **options: See `lingrad.convert.convert_run`.

    Returns:
        The report.
    """
    with progress("exporting", "tensor", least=100) as tick:
        return run.convert_run(checkpoint, out, start=start, tick=tick, **options)


def merge(start: Path, adapter: Path, out: Path) -> Path:
    """`lingrad.convert.merge` with a progress bar.

    Args:
        start: The starting model's folder.
        adapter: The adapter's folder.
        out: The merged model's folder.

    Returns:
        The merged model's folder.
    """
    with progress("merging", "tensor", least=100) as tick:
        return merge_(start, adapter, out, tick=tick)
