"""Checkpoint folders of the Trainer: which of them are complete.

The Trainer writes directly into ``checkpoint-N``: the model, the optimizer, the schedule, the state of the random generators,
and ``trainer_state.json`` last. If it is killed meanwhile, an incomplete folder is left that ``resume_from_checkpoint=True``
would use.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lingrad.errors import CheckpointError, DataError
from lingrad.files.model_folder import WEIGHTS, weight_files
from lingrad.files.reading import read_json
from lingrad.files.shards import check_shards
from lingrad.files.tensorfile import TensorFile

_NAME = re.compile(r"checkpoint-(\d+)")
_PICKLED = "pytorch_model.bin"  # never loaded here, but the Trainer may have written it
_DAMAGED = (zipfile.BadZipFile, EOFError)
_INDEX = ".metadata"  # of torch.distributed.checkpoint, which writes it last
# the model and the optimizer of a Trainer with FSDP, by fsdp_config["state_dict_type"]
_SHARDED = (("pytorch_model_fsdp.bin", "optimizer.bin"), (f"pytorch_model_fsdp_0/{_INDEX}", f"optimizer_0/{_INDEX}"))


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last complete checkpoint of a run, for ``trainer.train(resume_from_checkpoint=...)``.

    Warns of later ones that it passes over, and says what they lack.

    Args:
        output_dir: The run's ``output_dir``; need not exist.

    Returns:
        The folder, or None where there is no complete one. Errors of the operating system are not translated.
    """
    last, incomplete = _last(Path(output_dir))
    if incomplete:
        found = "; ".join(f"'{path}': {fault}" for path, fault in incomplete)
        instead = f"'{last}' is the last complete one" if last else "no complete one is left, and a run would start anew"
        warnings.warn(f"a checkpoint that cannot be resumed from is passed over ({found}); {instead}", stacklevel=2)
    return last


def _last(folder: Path) -> tuple[str | None, list[tuple[Path, str]]]:
    """The last complete checkpoint, and those after it, with what they lack."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    incomplete: list[tuple[Path, str]] = []
    for step in sorted(found, reverse=True):
        if not (fault := missing_from(found[step])):
            return str(found[step]), incomplete
        incomplete.append((found[step], fault))
    return None, incomplete


def check_checkpoint(folder: str | Path) -> None:
    """Make sure that a checkpoint is complete, so that a run can be resumed from it.

    Args:
        folder: A folder ``checkpoint-N``.

    Raises:
        CheckpointError: It is not; the message names what is missing or truncated, and the last complete one.
    """
    folder = Path(folder)
    fault = missing_from(folder)
    if fault:
        other, _ = _last(folder.parent)
        remedy = f"the last complete one is '{other}'" if other else "there is no complete one in the same folder"
        raise CheckpointError(f"the checkpoint '{folder}' cannot be resumed from: {fault}; {remedy}")


def missing_from(folder: Path) -> str:
    """What a checkpoint lacks.

    Args:
        folder: The folder.

    Returns:
        The first fault, as a part of a sentence; empty where it is complete.
    """
    if not folder.is_dir():
        return "there is no such folder"
    sharded = next((names for names in _SHARDED if (folder / Path(names[0]).parts[0]).exists()), None)
    try:
        weights = weight_files(folder) or weight_files(folder, _PICKLED)
    except DataError as error:
        return str(error)
    if not weights and sharded is None:
        return f"there is no {WEIGHTS}"
    rng = sorted(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
    checked: list[tuple[Path, Callable[[Path], Any]]] = [
        *((folder / name, TensorFile if name.endswith(".safetensors") else _open_zip) for name in weights),
        *((folder / name, check_shards if name.endswith(_INDEX) else _open_zip) for name in sharded or ("optimizer.pt",)),
        *((path, _open_zip) for path in (folder / "scheduler.pt", *rng)),
        (folder / "trainer_state.json", _read_state),  # written last
    ]
    for path, read in checked:
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            return f"there is no {name}"
        try:
            read(path)
        except (OSError, ValueError, KeyError, TypeError, *_DAMAGED) as error:  # a DataError is a ValueError
            return f"{name} is truncated or damaged ({error})"
    return ""


def _open_zip(path: Path) -> None:
    zipfile.ZipFile(path).close()  # reads the directory, which is at the end


def _read_state(path: Path) -> None:
    int(read_json(path)["global_step"])
