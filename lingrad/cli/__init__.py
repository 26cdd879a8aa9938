"""The command line: parse the arguments, call one function, print its result. No logic."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from typing import Annotated

import typer

from lingrad import __version__
from lingrad import explain as explain_
from lingrad.cli.adapters import adapters
from lingrad.cli.common import EXIT_CODES, Command, group
from lingrad.cli.memory import memory
from lingrad.cli.options import Json, Model, Share
from lingrad.files.results import check_folders, example, finish
from lingrad.memory import named, simulate
from lingrad.models import open_model
from lingrad.research.cli import studies

EPILOG = example('lingrad memory simulate --model llama-7b --rules "svd(rank=1024)" --capacity 24G') + "\n\n" + EXIT_CODES
app = group(
    "Train large models in less memory: gradients are mapped to a small space, as GaLore does, or adapters are trained, as "
    "LoRA does, with one engine. The commands show what a method would take of a GPU and what it does to a model, compare "
    "methods and learning rates, and turn runs into adapters that PEFT loads. Training itself is Python: lingrad.wrap(model).",
    EPILOG,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _program(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version, and nothing else.")
    ] = False,
) -> None:
    ctx.obj = simulate  # for studies, which know nothing of memory


@app.command(epilog=example('lingrad explain "*.mlp.*: svd(rank=64); *: none" --model llama-7b'))
def explain(
    rules: Annotated[str, typer.Argument(metavar="RULES", help="Config string, or rules: '*.attn.*: svd(rank=64); *: none'.")],
    model: Model = "demo",
    every_parameter: Annotated[bool, typer.Option("--all", help="One line for every parameter.")] = False,
    share: Share = False,
    json: Json = None,
) -> None:
    """Show which parameters rules transform, and to what sizes."""
    check_folders(json)
    found = explain_(open_model(model), rules, share="input" if share else None, every_parameter=every_parameter)
    finish(json, lambda: json_.dumps(asdict(found), indent=1), lambda: typer.echo(found))


@app.command(epilog=example("lingrad methods"))
def methods(json: Json = None) -> None:
    """List published methods by name. Each is a combination of parts; a name may be given as rules."""
    check_folders(json)
    finish(json, lambda: json_.dumps(named.rows(), indent=1), lambda: typer.echo(named.table()))


@app.command(epilog=example("lingrad version"))
def version(json: Json = None) -> None:
    """Print the version."""
    check_folders(json)
    finish(json, lambda: json_.dumps({"lingrad": __version__}), lambda: typer.echo(__version__))


app.add_typer(memory, name="memory")
_own = app.registered_commands  # in the order of the list of commands
app.registered_commands = [*studies.registered_commands, *_own[:1], *adapters.registered_commands, *_own[1:]]
for _info in (*app.registered_commands, *memory.registered_commands):
    _info.cls = Command
