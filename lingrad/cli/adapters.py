"""``lingrad convert``, ``export``, ``check-adapter`` and ``merge``: runs as adapters, and adapters as models."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lingrad.cli.options import Allow, BaseModel, Factors, Json, Logits, NewAdapter, Rank, Target, UniformRank
from lingrad.convert import commands
from lingrad.files.results import check_folders, example, finish

adapters = typer.Typer()


@adapters.command(epilog=example("lingrad convert START TUNED --out LORA --max-error 0.01"))
def convert(
    start: Annotated[Path, typer.Argument(metavar="START", help="Folder of the model that the training started from.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="Folder of the trained model.")],
    out: NewAdapter,
    rank: Rank = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of each change's squared norm.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Leave at most this share of each change's norm.")] = None,
    dtype: Factors = None,
    uniform_rank: UniformRank = False,
    full_svd: Annotated[bool, typer.Option("--full-svd", help="Full decompositions instead of random projections.")] = False,
    logits: Logits = False,
    decayed_start: Annotated[Path | None, typer.Option(help="Write START with its decay applied to this folder.")] = None,
    target: Target = "peft",
    allow_residual: Allow = None,
    base_model: BaseModel = None,
    json: Json = None,
) -> None:
    """Turn the difference of two models into an adapter for PEFT. For a lingrad run with a ledger use lingrad export."""
    check_folders(json)
    options: dict[str, Any] = {"rank": rank, "energy": energy, "max_error": max_error, "dtype": dtype, "logits": logits}
    options |= {"uniform_rank": uniform_rank, "full_svd": full_svd, "decayed_start": decayed_start}
    options |= {"target": target, "allow_residual": allow_residual, "base_model": base_model}
    report = commands.convert(start, tuned, out, **options)
    finish(json, report.json, lambda: typer.echo(f"{report.table()}\nWritten: {out}"))


@adapters.command(epilog=example("lingrad export RUN --out LORA --start START"))
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a checkpoint: the model and optimizer.pt.")],
    out: NewAdapter,
    start: Annotated[Path | None, typer.Option(help="Folder of the model that the run started from, to compare with.")] = None,
    rank: Rank = None,
    dtype: Factors = None,
    uniform_rank: UniformRank = False,
    logits: Logits = False,
    decayed_start: Annotated[Path | None, typer.Option(help="Write START with its decay applied to this folder.")] = None,
    target: Target = "peft",
    allow_residual: Allow = None,
    base_model: BaseModel = None,
    json: Json = None,
) -> None:
    """Turn a checkpoint of lingrad into an adapter for PEFT. The run needs ledger=True; nothing is searched for."""
    check_folders(json)
    options: dict[str, Any] = {"rank": rank, "dtype": dtype, "uniform_rank": uniform_rank, "logits": logits}
    options |= {"target": target, "allow_residual": allow_residual, "base_model": base_model}
    report = commands.export(run, out, start=start, decayed_start=decayed_start, **options)
    finish(json, report.json, lambda: typer.echo(f"{report.table()}\nWritten: {out}"))


@adapters.command("check-adapter", epilog=example("lingrad check-adapter LORA --for vllm"))
def check(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter of PEFT, of any program.")],
    loader: Annotated[str | None, typer.Option("--for", help="One loader: vllm, llama.cpp, tgi or diffusers.")] = None,
    json: Json = None,
) -> None:
    """Say which servers load an adapter as PEFT does. Some refuse one, some change it without an error."""
    check_folders(json)
    found = commands.check_adapter(adapter, loader)
    plain = {"folder": found.folder, "findings": [{**asdict(one), "verdict": one.verdict} for one in found.findings]}
    finish(json, lambda: json_.dumps(plain, indent=1), lambda: typer.echo(found))


@adapters.command(epilog=example("lingrad merge START LORA --out MERGED"))
def merge(
    start: Annotated[Path, typer.Argument(metavar="START", help="Folder of the model that the adapter is for.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; must not exist.")],
    json: Json = None,
) -> None:
    """Merge an adapter into the model it is for. The result is a plain model."""
    check_folders(json)
    folder = commands.merge(start, adapter, out)
    finish(json, lambda: json_.dumps({"written": [str(folder)]}), lambda: typer.echo(f"Written: {folder}"))
