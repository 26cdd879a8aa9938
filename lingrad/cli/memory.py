"""``lingrad memory``: how much memory a run would take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lingrad.cli.common import group, require_fits
from lingrad.cli.options import (
    Base,
    Batch,
    Capacity,
    Checkpointing,
    Context,
    Dtype,
    Expandable,
    Json,
    Layerwise,
    Length,
    Mode,
    Model,
    Offload,
    Plot,
    Ranks,
    Rules,
    Share,
    Stagger,
)
from lingrad.files.results import check_folders, example, finish, written
from lingrad.memory import alternatives, commands
from lingrad.memory.commands import Question
from lingrad.memory.units import CONTEXT

memory = group(
    "Show how much memory a run would take, without running it.",
    example("lingrad memory simulate --model llama-7b --capacity 24GiB"),
)


@memory.command(epilog=example('lingrad memory simulate --model llama-7b --rules "svd(rank=1024)" --layerwise'))
def simulate(
    model: Model,
    rules: Rules = "svd(rank=128)",
    base: Base = None,
    mode: Mode = "optimizer",
    batch: Batch = 1,
    length: Length = 256,
    dtype: Dtype = "bfloat16",
    checkpointing: Checkpointing = False,
    layerwise: Layerwise = False,
    capacity: Capacity = None,
    context: Context = CONTEXT,
    share: Share = False,
    stagger: Stagger = False,
    expandable: Expandable = False,
    ranks: Ranks = 1,
    offload: Offload = None,
    json: Json = None,
    plot: Plot = None,
    snapshot: Annotated[Path | None, typer.Option(help="Write a snapshot for pytorch.org/memory_viz to this file.")] = None,
) -> None:
    """Report the memory of a run, simulated on meta tensors. These have shapes and no values, and take no memory.

    A run that does not fit is simulated again with what would save memory, for about a minute.
    """
    check_folders(json, plot, snapshot)
    question = _question(locals())
    report = commands.simulate(question)
    written(plot, report.plot)
    written(snapshot, report.to_snapshot)
    finish(json, report.to_json, lambda: typer.echo(report))
    if report.fits is False and json != Path("-"):
        typer.echo(f"\n{alternatives.fitting(question)}")
    require_fits(report.fits)


@memory.command(epilog=example('lingrad memory fit --model llama-7b --rules "svd(rank=1024)" --layerwise --capacity 24GiB'))
def fit(
    model: Model,
    capacity: Annotated[str, typer.Option(help="Memory of the device, such as 24GiB or 24G.")],
    context: Context = CONTEXT,
    rules: Rules = "svd(rank=128)",
    base: Base = None,
    mode: Mode = "optimizer",
    length: Length = 256,
    dtype: Dtype = "bfloat16",
    checkpointing: Checkpointing = False,
    layerwise: Layerwise = False,
    share: Share = False,
    stagger: Stagger = False,
    expandable: Expandable = False,
    ranks: Ranks = 1,
    offload: Offload = None,
    json: Json = None,
) -> None:
    """Find the largest batch that fits in the memory of a device."""
    check_folders(json)
    found = commands.fit(_question(locals()))
    finish(json, found.to_json, lambda: typer.echo(found))
    require_fits(found.rows > 0)


@memory.command(epilog=example('lingrad memory compare --model llama-1b --rules "svd(rank=512)" --plot bars.png'))
def compare(
    model: Model,
    rules: Annotated[str, typer.Option(help="Config string with a rank, which all methods use.")] = "svd(rank=128)",
    base: Base = None,
    batch: Batch = 1,
    length: Length = 256,
    dtype: Dtype = "bfloat16",
    checkpointing: Checkpointing = False,
    layerwise: Layerwise = False,
    capacity: Capacity = None,
    context: Context = CONTEXT,
    share: Share = False,
    stagger: Stagger = False,
    expandable: Expandable = False,
    offload: Offload = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Compare the memory of AdamW, galore_torch, lingrad and LoRA. All are simulated under the same conditions."""
    check_folders(json, plot)
    found = commands.compare(_question(locals()))
    written(plot, found.plot)
    finish(json, found.to_json, lambda: typer.echo(found))


@memory.command(epilog=example('lingrad memory estimate --model llama-70b --rules "svd(rank=1024)" --base adamw8bit'))
def estimate(
    model: Model,
    rules: Rules = "svd(rank=128)",
    base: Base = None,
    mode: Mode = "optimizer",
    batch: Batch = 1,
    length: Length = 256,
    dtype: Dtype = "bfloat16",
    layerwise: Layerwise = False,
    share: Share = False,
    ranks: Ranks = 1,
    offload: Offload = None,
    json: Json = None,
) -> None:
    """Compute the memory between steps in closed form. It is counted from shapes and dtypes; nothing is run."""
    check_folders(json)
    found = commands.estimate(_question(locals()))
    finish(json, found.to_json, lambda: typer.echo(found))


def _question(options: dict[str, Any]) -> Question:
    return Question(**{name: value for name, value in options.items() if name in Question.__dataclass_fields__})
