"""The command line: parse the arguments, call one function, print its result. No logic."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lingrad import __version__
from lingrad.config.explain import explain as explain_
from lingrad.convert import commands as convert_commands
from lingrad.convert.cli import adapters
from lingrad.files.results import check_folders, example, finish, written
from lingrad.memory import commands as memory_commands
from lingrad.memory import named
from lingrad.memory.commands import Question
from lingrad.models import open_model
from lingrad.research import commands as research_commands
from lingrad.research import report as research_report
from lingrad.research.cli import studies

EXIT_CODES = (
    "Exit codes: 0 done; 1 an unexpected error, with a traceback; 2 wrong input, or a request that cannot be met: the message "
    "says why; 130 interrupted."
)


def _group(help: str, epilog: str) -> typer.Typer:  # noqa: A002 - as typer calls it
    return typer.Typer(help=help, epilog=epilog, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


EPILOG = example('lingrad explain "svd(rank=64)" --model llama-7b') + "\n\n" + EXIT_CODES
app = _group("Low-rank training as a gradient transformation or as an adapter: one engine, two modes.", EPILOG)
memory = _group(
    "Show how much memory a run would take, without running it.",
    example("lingrad memory simulate --model llama-7b --capacity 24GiB"),
)
app.add_typer(memory, name="memory")

Base = Annotated[str | None, typer.Option(help="Base optimizer, such as adamw8bit or lion; else a method's, or adamw.")]
Batch = Annotated[int, typer.Option(help="Rows of a batch.")]
Capacity = Annotated[str | None, typer.Option(help="Memory of the device, such as 24GiB: say whether the run fits.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Recompute layers in the backward.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the model: bfloat16, float16, float32; int8: linear layers in 8 bits.")]
Expandable = Annotated[bool, typer.Option("--expandable", help="Model CUDA's expandable segments.")]
Factors = Annotated[str | None, typer.Option(help="Dtype of the factors: fp32, bf16, fp16 or fp64.")]
Json = Annotated[Path | None, typer.Option(help="Write the report as JSON to this file; - prints the JSON and nothing else.")]
Layerwise = Annotated[bool, typer.Option("--layerwise", help="Step each weight inside the backward.")]
Length = Annotated[int, typer.Option(help="Tokens of a row.")]
Logits = Annotated[bool, typer.Option("--logits", help="Load both models and compare their logits through PEFT.")]
Mode = Annotated[str, typer.Option(help="Mode: optimizer or adapter.")]
Model = Annotated[str, typer.Option(help="llama-60m ... llama-70b, demo, a config.json of transformers, or a folder with one.")]
NewAdapter = Annotated[Path, typer.Option(help="Folder of the adapter; must not exist.")]
Offload = Annotated[str | None, typer.Option(help="In host memory between steps: moments, bases, or 'moments, bases'.")]
Plot = Annotated[Path | None, typer.Option(help="Write a plot to this file, such as run.png.")]
Rank = Annotated[int | None, typer.Option(help="At most this many columns for each weight.")]
Ranks = Annotated[int, typer.Option(min=1, help="Processes over which fully_shard cuts every weight.")]
Results = Annotated[Path, typer.Option(help="Folder of the results.")]
Rules = Annotated[str, typer.Option(help="Config string, or rules: '*.attn.*: svd(rank=64); *: none'.")]
Share = Annotated[bool, typer.Option("--share", help="Share right bases among layers that read the same input.")]
Stagger = Annotated[bool, typer.Option("--stagger", help="Refresh weights in turns.")]
Allow = Annotated[float | None, typer.Option(help="Accept an adapter that leaves this share of a weight's change out.")]
BaseModel = Annotated[str | None, typer.Option(help="What others know the starting model by, such as owner/name.")]
Target = Annotated[str, typer.Option(help="What is to load the adapter: peft, vllm, llama.cpp or diffusers.")]
UniformRank = Annotated[bool, typer.Option("--uniform-rank", help="One rank for all weights: the largest that one needs.")]


@app.command(epilog=example("lingrad demo --steps 60 --out runs/demo"))
def demo(
    out: Results = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=3, help="Training steps; 200 by default.")] = None,
    json: Json = None,
) -> None:
    """Train a small Llama on Moby-Dick with seven methods. Full AdamW, GaLore in both modes, a random map, online PCA."""
    check_folders(json)
    result = research_commands.demo(out, steps=steps)
    finish(json, lambda: research_report.to_json(result), lambda: research_commands.show(result, out))


@app.command(epilog=example('lingrad train --text book.txt --rules "random(rank=64, every=50)" --steps 100'))
def train(
    text: Annotated[Path, typer.Option(help="A UTF-8 text to train on.")],
    rules: Rules = "svd(rank=64, every=50)",
    base: Base = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    scale: Annotated[float, typer.Option(help="Factor on the learning rate of the coordinates.")] = 0.25,
    carry: Annotated[str, typer.Option(help="Moments at a refresh: keep, reset, rotate or transport.")] = "keep",
    steps: Annotated[int, typer.Option(min=3, help="Training steps; two mode switches need three.")] = 200,
    length: Annotated[int, typer.Option(min=2, help="Bytes in a window.")] = 64,
    out: Results = Path("runs/train"),
    json: Json = None,
) -> None:
    """Train the demo's model on your own text. One method in both modes is compared with full-rank training."""
    check_folders(json)
    options: dict[str, Any] = {"base": base, "lr": lr, "scale": scale, "carry": carry, "steps": steps, "length": length}
    result = research_commands.train(text, rules, out, **options)
    finish(json, lambda: research_report.to_json(result), lambda: research_commands.show(result, out))


app.registered_commands += [*studies.registered_commands, *adapters.registered_commands]


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
    share: Share = False,
    stagger: Stagger = False,
    expandable: Expandable = False,
    ranks: Ranks = 1,
    offload: Offload = None,
    json: Json = None,
    plot: Plot = None,
    snapshot: Annotated[Path | None, typer.Option(help="Write a snapshot for pytorch.org/memory_viz to this file.")] = None,
) -> None:
    """Report the memory of a run, simulated on meta tensors. These have shapes and no values, and take no memory."""
    check_folders(json, plot, snapshot)
    question = _question(locals())
    report = memory_commands.simulate(question)
    written(plot, report.plot)
    written(snapshot, report.to_snapshot)
    finish(json, report.to_json, lambda: typer.echo(report))


@memory.command(epilog=example('lingrad memory fit --model llama-7b --rules "svd(rank=1024)" --layerwise --capacity 24GiB'))
def fit(
    model: Model,
    capacity: Annotated[str, typer.Option(help="Memory of the device, such as 24GiB.")],
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
    found = memory_commands.fit(_question(locals()))
    finish(json, found.to_json, lambda: typer.echo(found))


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
    share: Share = False,
    stagger: Stagger = False,
    expandable: Expandable = False,
    offload: Offload = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Compare the memory of AdamW, galore_torch, lingrad and LoRA. All are simulated under the same conditions."""
    check_folders(json, plot)
    found = memory_commands.compare(_question(locals()))
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
    found = memory_commands.estimate(_question(locals()))
    finish(json, found.to_json, lambda: typer.echo(found))


@app.command(epilog=example("lingrad convert START TUNED --out LORA --max-error 0.01"))
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
    report = convert_commands.convert(start, tuned, out, **options)
    finish(json, report.json, lambda: typer.echo(f"{report.table()}\nWritten: {out}"))


@app.command(epilog=example("lingrad export RUN --out LORA --start START"))
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
    report = convert_commands.export(run, out, start=start, decayed_start=decayed_start, **options)
    finish(json, report.json, lambda: typer.echo(f"{report.table()}\nWritten: {out}"))


@app.command(epilog=example("lingrad merge START LORA --out MERGED"))
def merge(
    start: Annotated[Path, typer.Argument(metavar="START", help="Folder of the model that the adapter is for.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; must not exist.")],
) -> None:
    """Merge an adapter into the model it is for, and write the result."""
    typer.echo(f"Written: {convert_commands.merge(start, adapter, out)}")


@app.command(epilog=example("lingrad methods"))
def methods() -> None:
    """List published methods by name, each a combination of parts. A name may be given as rules."""
    typer.echo(named.table())


@app.command(epilog=example("lingrad version"))
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _question(options: dict[str, Any]) -> Question:
    return Question(**{name: value for name, value in options.items() if name in Question.__dataclass_fields__})
