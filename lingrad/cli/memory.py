"""``lingrad memory``: how much memory a run would take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lingrad.cli.common import group, require_fits
from lingrad.cli.options import Json, Plot
from lingrad.cli.questions import asks
from lingrad.files.results import check_folders, example, finish, written
from lingrad.memory import alternatives, commands
from lingrad.memory.commands import Question
from lingrad.memory.plots import check_format

memory = group(
    "Show how much memory a run would take, without running it.",
    example("lingrad memory simulate --model llama-7b --capacity 24GiB"),
)
FitCapacity = Annotated[str, typer.Option(help="Memory of the device, such as 24GiB or 24G.")]
OneRank = Annotated[str, typer.Option(help="Config string with a rank, which all methods use.")]
Snapshot = Annotated[Path | None, typer.Option(help="Write a snapshot for pytorch.org/memory_viz to this file.")]


@memory.command(epilog=example('lingrad memory simulate --model llama-7b --rules "svd(rank=1024)" --layerwise'))
@asks()
def simulate(question: Question, json: Json = None, plot: Plot = None, snapshot: Snapshot = None) -> None:
    """Report the memory of a run, simulated on meta tensors. These have shapes and no values, and take no memory.

    A run that does not fit is simulated again with what would save memory, for about a minute.
    """
    check_folders(json, plot, snapshot)
    written(plot, check_format)
    report = commands.simulate(question)
    written(plot, report.plot)
    written(snapshot, report.to_snapshot)
    finish(json, report.to_json, lambda: typer.echo(report))
    if report.fits is False and json != Path("-"):
        typer.echo(f"\n{alternatives.fitting(question)}")
    require_fits(report.fits)


@memory.command(epilog=example('lingrad memory fit --model llama-7b --rules "svd(rank=1024)" --layerwise --capacity 24GiB'))
@asks("batch", capacity=FitCapacity)
def fit(question: Question, json: Json = None) -> None:
    """Find the largest batch that fits in the memory of a device."""
    check_folders(json)
    found = commands.fit(question)
    finish(json, found.to_json, lambda: typer.echo(found))
    require_fits(found.rows > 0)


@memory.command(epilog=example('lingrad memory compare --model llama-1b --rules "svd(rank=512)" --plot bars.png'))
@asks("mode", "ranks", rules=OneRank)
def compare(question: Question, json: Json = None, plot: Plot = None) -> None:
    """Compare the memory of AdamW, galore_torch, lingrad and LoRA. All are simulated under the same conditions."""
    check_folders(json, plot)
    written(plot, check_format)
    found = commands.compare(question)
    written(plot, found.plot)
    finish(json, found.to_json, lambda: typer.echo(found))


@memory.command(epilog=example('lingrad memory estimate --model llama-70b --rules "svd(rank=1024)" --base adamw8bit'))
@asks("checkpointing", "capacity", "context", "stagger", "expandable")
def estimate(question: Question, json: Json = None) -> None:
    """Compute the memory between steps in closed form. It is counted from shapes and dtypes; nothing is run."""
    check_folders(json)
    found = commands.estimate(question)
    finish(json, found.to_json, lambda: typer.echo(found))
