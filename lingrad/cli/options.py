"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SPELLINGS = {
    "bfloat16": ("bf16", "bfloat16"),
    "float16": ("fp16", "float16", "half", "f16"),
    "float32": ("fp32", "float32", "float", "f32"),
    "float64": ("fp64", "float64", "double", "f64"),
    "int8": ("int8", "i8", "8bit"),
}


def _dtype(value: str | None) -> str | None:
    """A dtype by its full name; what is none is left for the command to refuse."""
    plain = "" if value is None else value.lower().removeprefix("torch.")
    return next((name for name, known in _SPELLINGS.items() if plain in known), value)


Allow = Annotated[float | None, typer.Option(help="Accept an adapter that leaves this share of a weight's change out.")]
Base = Annotated[str | None, typer.Option(help="Base optimizer, such as adamw8bit or lion; else a method's, or adamw.")]
BaseModel = Annotated[str | None, typer.Option(help="What others know the starting model by, such as owner/name.")]
Batch = Annotated[int, typer.Option(help="Rows of a batch.")]
Capacity = Annotated[str | None, typer.Option(help="Memory of the device, such as 24GiB or 24G: say whether the run fits.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Recompute layers in the backward.")]
Context = Annotated[str, typer.Option(help="What the CUDA context takes of --capacity, besides tensors; 0 for none.")]
Dtype = Annotated[
    str,
    typer.Option(callback=_dtype, help="Dtype of the model: bf16, fp16 or fp32, or in full; int8: linear layers in 8 bits."),
]
Expandable = Annotated[bool, typer.Option("--expandable", help="Model CUDA's expandable segments.")]
Factors = Annotated[str | None, typer.Option(callback=_dtype, help="Dtype of the factors: fp32, bf16, fp16 or fp64.")]
Json = Annotated[Path | None, typer.Option(help="Write the report as JSON to this file; - prints the JSON and nothing else.")]
Layerwise = Annotated[bool, typer.Option("--layerwise", help="Step each weight inside the backward.")]
Length = Annotated[int, typer.Option(help="Tokens of a row.")]
Logits = Annotated[bool, typer.Option("--logits", help="Load both models and compare all their outputs through PEFT.")]
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
Target = Annotated[str, typer.Option(help="What is to load the adapter: peft, vllm, llama.cpp or diffusers.")]
UniformRank = Annotated[bool, typer.Option("--uniform-rank", help="One rank for all weights: the largest that one needs.")]
