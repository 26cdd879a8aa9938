"""The command line: arguments in, one call, output. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lingrad import __version__
from lingrad.explain import explain as explain_
from lingrad.research import jobs
from lingrad.research.models import open_model

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Spec = Annotated[str, typer.Option(help="Config string, such as 'svd(rank=64, every=50)'.")]


@app.callback()
def main() -> None:
    """Low-rank training as gradient transformation or as adapter: one engine, two modes."""


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=3, help="Training steps; the demo's own number if left out.")] = None,
) -> None:
    """Train a small Llama on Moby-Dick: full AdamW, GaLore in both modes, a random map, online PCA."""
    jobs.demo(out, steps=steps)


@app.command()
def train(
    text: Annotated[Path, typer.Option(help="A UTF-8 text to train on.")],
    spec: Spec = "svd(rank=64, every=50)",
    base: Annotated[str, typer.Option(help="Base optimizer.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    scale: Annotated[float, typer.Option(help="Factor on the learning rate of the coordinates.")] = 0.25,
    carry: Annotated[str, typer.Option(help="What happens to moments at a refresh: keep, reset or rotate.")] = "keep",
    steps: Annotated[int, typer.Option(min=3, help="Training steps; two switches need three.")] = 200,
    length: Annotated[int, typer.Option(min=2, help="Bytes in a window.")] = 64,
    out: Out = Path("runs/train"),
) -> None:
    """Train the demo's model on your own text: one transform in both modes, beside full-rank AdamW."""
    jobs.train(text, spec, out, base=base, lr=lr, scale=scale, carry=carry, steps=steps, length=length)


@app.command()
def explain(
    spec: Annotated[str, typer.Argument(help="Config string, or rules: '*.attn.*: svd(rank=64); *: none'.")],
    model: Annotated[str, typer.Option(help="'demo', a config.json of transformers, or a folder with one.")] = "demo",
    every_parameter: Annotated[bool, typer.Option("--all", help="One line for every parameter.")] = False,
) -> None:
    """Show which parameters a spec or rules transform, and to what sizes."""
    typer.echo(explain_(open_model(model), spec, every_parameter=every_parameter))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
