"""Checkpoint folders of the Trainer: which are complete.

The Trainer writes straight into ``checkpoint-N``: the model, the optimizer, the schedule, the state of the generators, and
``trainer_state.json`` last. A process that is killed meanwhile leaves a folder that looks like any other, and
``resume_from_checkpoint=True`` takes it.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lingrad.errors import CheckpointError, optional

_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last complete checkpoint of a run, for ``trainer.train(resume_from_checkpoint=...)``.

    Args:
        output_dir: The run's ``output_dir``; need not exist.

    Returns:
        The folder, or None where there is no complete one. Errors of the operating system come as they are.
    """
    folder = Path(output_dir)
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    for step in sorted(found, reverse=True):
        if not missing_from(found[step]):
            return str(found[step])
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Make sure that a checkpoint is complete, so that a run can be resumed from it.

    Args:
        folder: A folder ``checkpoint-N``.

    Raises:
        CheckpointError: It is not; the message names what is missing or cut short, and the last complete one beside it.
    """
    folder = Path(folder)
    fault = missing_from(folder)
    if fault:
        other = last_checkpoint(folder.parent)
        remedy = f"the last complete one is '{other}'" if other else "there is no complete one beside it"
        raise CheckpointError(f"the checkpoint '{folder}' cannot be resumed from: {fault}; {remedy}")


def missing_from(folder: Path) -> str:
    """What a checkpoint lacks.

    Args:
        folder: The folder.

    Returns:
        The first fault, as half a sentence; nothing where it is complete.
    """
    if not folder.is_dir():
        return "there is no such folder"
    weights = [path for path in (folder / "model.safetensors", folder / "pytorch_model.bin") if path.is_file()]
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file() and not weights:
            try:
                weights = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, AttributeError):
                return f"{index.name} is cut short or no index of weights"
    if not weights:
        return "there is no model.safetensors"
    rng = sorted(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
    checked: list[tuple[Path, Callable[[Path], Any]]] = [
        *((path, _open_safetensors if path.suffix == ".safetensors" else _open_zip) for path in weights),
        *((path, _open_zip) for path in (folder / "optimizer.pt", folder / "scheduler.pt", *rng)),
        (folder / "trainer_state.json", _read_state),  # written last
    ]
    for path, read in checked:
        if not path.is_file():
            return f"there is no {path.name}"
        try:
            read(path)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            return f"{path.name} is cut short or damaged ({error})"
    return ""


def _open_safetensors(path: Path) -> None:
    safetensors = optional("safetensors", "reading a checkpoint of the Trainer", "hf")
    try:
        with safetensors.safe_open(path, "pt") as file:  # compares the length with what the header says
            file.keys()
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _open_zip(path: Path) -> None:
    zipfile.ZipFile(path).close()  # reads the directory, which stands at the end


def _read_state(path: Path) -> None:
    int(json.loads(path.read_text())["global_step"])
