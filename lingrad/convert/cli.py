"""Commands of adapters, which the command line takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lingrad.files.results import example
from lingrad.peft.check import check_adapter

adapters = typer.Typer()


@adapters.command("check-adapter", epilog=example("lingrad check-adapter LORA --for vllm"))
def check(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter of PEFT, of any program.")],
    loader: Annotated[str | None, typer.Option("--for", help="One loader: vllm, llama.cpp, tgi or diffusers.")] = None,
) -> None:
    """Say which servers load an adapter as PEFT does. Some refuse one, some change it without an error."""
    typer.echo(check_adapter(adapter, loader))
