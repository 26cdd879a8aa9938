"""The command line: arguments in, one call, output. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lingrad import __version__
from lingrad.config.explain import explain as explain_
from lingrad.convert import commands as convert_commands
from lingrad.memory import commands as memory_commands
from lingrad.models import open_model
from lingrad.research import commands as research_commands

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
    research_commands.demo(out, steps=steps)


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
    research_commands.train(text, spec, out, base=base, lr=lr, scale=scale, carry=carry, steps=steps, length=length)


@app.command()
def explain(
    spec: Annotated[str, typer.Argument(help="Config string, or rules: '*.attn.*: svd(rank=64); *: none'.")],
    model: Annotated[str, typer.Option(help="'demo', a config.json of transformers, or a folder with one.")] = "demo",
    every_parameter: Annotated[bool, typer.Option("--all", help="One line for every parameter.")] = False,
    share: Annotated[bool, typer.Option("--share", help="Share right bases among layers that read one input.")] = False,
) -> None:
    """Show which parameters a spec or rules transform, and to what sizes."""
    typer.echo(explain_(open_model(model), spec, share="input" if share else None, every_parameter=every_parameter))


@app.command()
def memory(
    model: Annotated[str, typer.Option(help="llama-60m ... llama-70b, a config.json of transformers, or a folder with one.")],
    spec: Spec = "svd(rank=128)",
    base: Annotated[str, typer.Option(help="Base optimizer.")] = "adamw",
    mode: Annotated[str, typer.Option(help="optimizer or adapter.")] = "optimizer",
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute layers in the backward.")] = False,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="Step each weight inside the backward.")] = False,
    capacity: Annotated[str | None, typer.Option(help="Memory of the device, such as 24GiB, for a verdict.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Share right bases among layers that read one input.")] = False,
    stagger: Annotated[bool, typer.Option("--stagger", help="Refresh weights in turns.")] = False,
    expandable: Annotated[bool, typer.Option("--expandable", help="Model CUDA's expandable segments.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Beside full AdamW, galore_torch and LoRA.")] = False,
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Find the largest batch that fits.")] = False,
    closed_form: Annotated[bool, typer.Option("--closed-form", help="Only what stays between steps; runs nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the run, or the comparison, here.")] = None,
    snapshot: Annotated[Path | None, typer.Option(help="Write a snapshot for pytorch.org/memory_viz here.")] = None,
) -> None:
    """Show where a run's memory would go, and whether it fits, without running it."""
    asked = memory_commands.Asked(
        *(model, spec, base, mode, batch, seq, dtype, checkpointing, layerwise, capacity, expandable, share, stagger)
    )
    outputs = memory_commands.Outputs(json, plot, snapshot)
    typer.echo(memory_commands.answer(asked, outputs, compare_all=compare, max_batch=max_batch, closed_form=closed_form))


@app.command()
def convert(
    base: Annotated[Path, typer.Argument(help="Folder of the model that training started from; with --exact, of the run.")],
    tuned: Annotated[Path | None, typer.Argument(help="Folder of what became of it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapter; must not exist.")] = None,
    rank: Annotated[int | None, typer.Option(help="At most so many columns for each weight.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of each change's squared norm.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Leave at most this share of each change's norm.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the factors: fp32, bf16, fp16 or fp64.")] = None,
    uniform_rank: Annotated[bool, typer.Option("--uniform-rank", help="One rank for all: the largest needed.")] = False,
    full_svd: Annotated[bool, typer.Option("--full-svd", help="Decompose in full, not by random projections.")] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Load both models and compare logits through PEFT.")] = False,
    decayed_base: Annotated[Path | None, typer.Option(help="Write the base, weight decay applied, here.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="From the ledger of a lingrad run: RUN, or BASE RUN.")] = False,
) -> None:
    """Turn what a training made of a model into an adapter for PEFT: full models in, LoRA out."""
    asked = convert_commands.Asked(out, rank, energy, max_error, dtype, uniform_rank, full_svd, logits, decayed_base, exact)
    typer.echo(convert_commands.convert(base, tuned, asked))


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; must not exist.")],
) -> None:
    """Write the plain model that a base and an adapter make together."""
    typer.echo(convert_commands.merge(base, adapter, out))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
