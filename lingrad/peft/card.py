"""The model card of an adapter, README.md, with metadata by which a hub finds the starting model; and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingrad.errors import DataError, require, shown
from lingrad.files.atomic import write_whole
from lingrad.files.model_folder import copy_tokenizer
from lingrad.peft.check import AdapterCheck, judge, open_adapter_file
from lingrad.peft.loaders import LOADERS
from lingrad.peft.report import AdapterReport

CARD = "README.md"
FOLDER = "DIR"  # what the adapter's folder is called in commands, which hold wherever it is

_ON_A_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
_PIPELINES = {"CAUSAL_LM": "text-generation"}


def on_a_hub(name: str) -> bool:
    """Whether a name of a starting model is that of a repository, ``owner/name``, and of no folder here."""
    return _ON_A_HUB.fullmatch(name) is not None and not Path(name).exists()


def check_base_model(base_model: object) -> None:
    """Make sure that a name for the starting model is one; raises `SpecError` where it is not."""
    fits = base_model is None or (isinstance(base_model, str) and bool(base_model.strip()) and "\n" not in base_model)
    require(fits, "base_model", f"base_model must be the name or the folder of a model, not {shown(base_model)}")


def unnamed(base_model: str) -> list[str]:
    """A note where nobody who gets the adapter can know what it is for: its starting model has no name."""
    if base_model:
        return []
    return [
        "the adapter does not say which model it is for: base_model_name_or_path is empty, and programs that load the model by "
        "it fail. base_model='owner/name' names it"
    ]


def write_card(folder: Path, report: AdapterReport, config: Mapping[str, Any], transforms: Sequence[str] = ()) -> None:
    """Write the model card into an adapter's folder.

    Args:
        folder: The folder, with the adapter in it.
        report: Its report.
        config: Its config.
        transforms: Config strings of the bases that were trained in, where they are known.
    """
    write_whole(folder / CARD, card(report, config, open_check(folder), transforms).encode())


def open_check(folder: Path) -> AdapterCheck:
    """What each loader does with the adapter in a folder, with commands that name no folder of this machine."""
    adapter = open_adapter_file(folder)
    start = str(adapter.config.get("base_model_name_or_path") or "")
    adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": start if on_a_hub(start) else ""})
    return AdapterCheck(FOLDER, tuple(judge(loader, adapter, FOLDER) for loader in LOADERS.values()))


def card(report: AdapterReport, config: Mapping[str, Any], checked: AdapterCheck, transforms: Sequence[str] = ()) -> str:
    """The text of a model card.

    Args:
        report: The adapter's report.
        config: Its config.
        checked: What each loader does with it.
        transforms: See `write_card`.

    Returns:
        Markdown, with YAML in front.
    """
    start, task = str(config.get("base_model_name_or_path") or ""), config.get("task_type")
    known = on_a_hub(start)
    front = [f"base_model: {start}"] if known else []
    front += ["library_name: peft", *([f"pipeline_tag: {_PIPELINES[task]}"] if task in _PIPELINES else [])]
    front += ["tags:", *([f"- base_model:adapter:{start}"] if known else []), "- lora", "- lingrad"]
    ranks = sorted({row.rank for row in report.low_rank})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    of = f" of `{start}`" if known else " of a model that was read from a folder" if start else ""
    trained = f" Trained by `{'`, `'.join(transforms)}`." if transforms else ""
    lines = [
        *("---", *front, "---", "", "# LoRA adapter", ""),
        f"An adapter{of}, of {rank} for {len(report.low_rank)} weights, written by lingrad and loaded by PEFT alone.{trained}",
        "",
        f"Its residual, |W - (W_start + B A)| / |W - W_start| over all of these weights together, is {report.residual:.1e}.",
        *("", "## Loading it", "", "```python", *_python(start if known else "START", task), "```", ""),
        "| loader | | |",
        "|---|---|---|",
    ]
    for found in checked.findings:
        why = f"`{found.command}`" if found.verdict == "loads" else "; ".join(found.refused or found.changed)
        lines.append(f"| {LOADERS[found.loader].title} | {found.verdict} | {why.replace('|', '&#124;')} |")
    table = replace(report, start=None, path="").table()
    return "\n".join([*lines, "", "## What is in it", "", "```text", table, "```", ""])


def _python(start: str, task: Any) -> list[str]:
    cls = _CLASSES.get(task, "AutoModel")
    return [
        "from peft import PeftModel",
        f"from transformers import {cls}",
        "",
        f'model = PeftModel.from_pretrained({cls}.from_pretrained("{start}"), "{FOLDER}")',
    ]


def add_tokenizer(folder: Path, tokenizer: Any, default: Path | None = None) -> None:
    """Copy the tokenizer and its chat template into an adapter's folder.

    Args:
        folder: The adapter's folder.
        tokenizer: A folder with one, or a tokenizer of transformers; None for that of ``default``, where it has one.
        default: A folder.

    Raises:
        DataError: The folder given has none, or what was given is something else.
    """
    if tokenizer is None:
        if default is not None and default.is_dir():
            copy_tokenizer(default, folder)
    elif isinstance(tokenizer, str | Path):
        if not copy_tokenizer(Path(tokenizer), folder):
            raise DataError(f"'{tokenizer}' has no tokenizer; expected a folder that tokenizer.save_pretrained wrote")
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    else:
        raise DataError(f"tokenizer must be a folder or a tokenizer of transformers, not a {type(tokenizer).__name__}")
