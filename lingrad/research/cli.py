"""Commands of studies and of the learning rate, which the command line takes over; its ``obj`` simulates memory."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated, Any

import typer

from lingrad.files.results import check_folders, example, finish
from lingrad.research import commands

studies = typer.Typer()

Base = Annotated[str, typer.Option(help="Base optimizer, such as adamw8bit or lion.")]
Carry = Annotated[str, typer.Option(help="Moments at a refresh: keep, reset, rotate or transport.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process.")]
Length = Annotated[int, typer.Option(min=2, help="Bytes in a window.")]
Rules = Annotated[str, typer.Option(help="Config string, or rules: '*.attn.*: svd(rank=64); *: none'.")]
Scale = Annotated[float, typer.Option(help="Factor on the learning rate of the coordinates.")]
Json = Annotated[Path | None, typer.Option(help="Write the report as JSON to this file; - prints the JSON and nothing else.")]


@studies.command(epilog=example("lingrad demo --steps 60 --out runs/demo"))
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=3, help="Training steps; 200 by default.")] = None,
    jobs: Jobs = 1,
    json: Json = None,
) -> None:
    """Train a small Llama on Moby-Dick by several methods. Full AdamW, GaLore in both modes, a random map, online PCA."""
    check_folders(json)
    _show(commands.demo(out, steps=steps, jobs=jobs, simulate=ctx.obj), json)


@studies.command(epilog=example('lingrad train --text book.txt --rules "random(rank=64, every=50)" --steps 100'))
def train(
    ctx: typer.Context,
    text: Annotated[Path, typer.Option(help="A UTF-8 text to train on.")],
    rules: Rules = "svd(rank=64, every=50)",
    base: Base = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    scale: Scale = 0.25,
    carry: Carry = "keep",
    steps: Annotated[int, typer.Option(min=3, help="Training steps; two mode switches need three.")] = 200,
    length: Length = 64,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/train"),
    jobs: Jobs = 1,
    json: Json = None,
) -> None:
    """Train the demo's model on your own text. One method in both modes is compared with full-rank training."""
    check_folders(json)
    options: dict[str, Any] = {"base": base, "lr": lr, "scale": scale, "carry": carry, "steps": steps, "length": length}
    _show(commands.train(text, rules, out, jobs=jobs, simulate=ctx.obj, **options), json)


@studies.command(epilog=example("lingrad run plan.toml --out runs/plan --jobs 2"))
def run(
    ctx: typer.Context,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan: a file of TOML.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; what it holds already is not run again.")],
    jobs: Jobs = 1,
    storage: Annotated[
        str | None, typer.Option(help="Database of the trials, such as sqlite:///trials.db, for machines to share.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="See that the plan runs: a tenth of the steps, one trial, one seed.")
    ] = False,
    json: Json = None,
) -> None:
    """Run a plan. Every entry is tuned with the same number of trials, and its best run with several seeds."""
    check_folders(json)
    _show(commands.run(plan, out, jobs=jobs, storage=storage, quick=quick, simulate=ctx.obj), json)


@studies.command(epilog=example("lingrad report runs/plan --x seconds --y loss"))
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER ...", help="Results of lingrad run; of several machines, all. Or a published file."),
    ],
    x: Annotated[str, typer.Option(help="Measure across, such as seconds.")] = "state MB",
    y: Annotated[str, typer.Option(help="Measure upwards; the task's metric by default.")] = "",
    versus: Annotated[
        str, typer.Option("--against", help="Entry that others are compared with; the plan's first by default.")
    ] = "",
    files: Annotated[Path | None, typer.Option(help="Where the files that the plan names are now, if they were moved.")] = None,
    out: Annotated[Path | None, typer.Option(help="Of a published file: a new folder for its results and report.")] = None,
    publish: Annotated[Path | None, typer.Option(help="Write all results into this file of JSON, to be published.")] = None,
    json: Json = None,
) -> None:
    """Write the report of a plan's results again. Markdown, pictures, and one page that needs no network."""
    check_folders(json)
    _show(commands.report_of(folders, x=x, y=y, versus=versus, files=files, out=out, publish=publish), json)


@studies.command(epilog=example('lingrad find-lr --text book.txt --rules "random(rank=64, every=50)" --low 1e-5'))
def find_lr(
    text: Annotated[Path, typer.Option(help="A UTF-8 text to train on.")],
    rules: Rules = "svd(rank=64, every=50)",
    base: Base = "adamw",
    mode: Annotated[str, typer.Option(help="Mode: optimizer or adapter.")] = "optimizer",
    low: Annotated[float, typer.Option(help="The first learning rate.")] = 1e-6,
    high: Annotated[float, typer.Option(help="The last learning rate.")] = 10.0,
    scale: Scale = 0.25,
    carry: Carry = "keep",
    steps: Annotated[int, typer.Option(min=2, help="Training steps, each at the next learning rate.")] = 100,
    length: Length = 64,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/find-lr"),
    json: Json = None,
) -> None:
    """Suggest a learning rate, by a range test. The rate rises from step to step; the model is that of lingrad train."""
    check_folders(json)
    options: dict[str, Any] = {"base": base, "mode": mode, "low": low, "high": high, "scale": scale, "carry": carry}
    found = commands.find_lr(text, rules, out, steps=steps, length=length, **options)
    finish(json, found.to_json, lambda: typer.echo(f"{found}\nWritten: {out / 'find-lr.json'}, {out / 'find-lr.png'}"))


def _show(files: list[Path], json: Path | None) -> None:
    names = [str(file) for file in files]
    finish(
        json,
        lambda: json_.dumps({**json_.loads((files[0].parent / "report.json").read_text()), "written": names}, indent=1),
        lambda: typer.echo(f"{files[0].read_text()}\nWritten: {', '.join(names)}"),
    )
