"""Optimizer states in files written by torch.save, read without executing anything in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lingrad.errors import CheckpointError, DataError

FILE = "optimizer.pt"


class Inert:
    """An object of another program: its saved attributes, without its code."""


def load_state(path: Path, inert: Sequence[str] = ()) -> dict[str, Any]:
    """Read an optimizer's state dict.

    Args:
        path: The file, or a checkpoint's folder that contains it as ``optimizer.pt``.
        inert: Full names of classes whose objects are read as `Inert`; all classes but these and those that torch allows are
            refused.

    Returns:
        ``state`` and ``param_groups``, tensors on the CPU.

    Raises:
        DataError: There is no such file.
        CheckpointError: It is damaged, is not an optimizer's state, or asks to run code.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"there is no '{file}'; expected what torch.save(optimizer.state_dict()) writes")
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in inert]):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file may raise any exception
        first = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), str(error))
        raise CheckpointError(
            f"'{file}' cannot be read as plain tensors and numbers, and nothing else is read: it is truncated, was written by "
            f"another program, or asks to run code ({type(error).__name__}: {first.strip()[:200]})"
        ) from None
    parts = (found.get("state"), found.get("param_groups")) if isinstance(found, dict) else (None, None)
    if not isinstance(parts[0], dict) or not isinstance(parts[1], list):
        raise CheckpointError(f"'{file}' is not an optimizer's state dict, which has 'state' and 'param_groups'")
    intact = all(isinstance(entries, dict) for entries in parts[0].values()) and all(map(_is_group, parts[1]))
    if not intact:
        raise CheckpointError(
            f"'{file}' is damaged: expected dicts in 'state', and in 'param_groups' dicts with a list 'params'"
        )
    return {"state": parts[0], "param_groups": parts[1]}


def _is_group(group: Any) -> bool:
    params = group.get("params") if isinstance(group, dict) else None
    return isinstance(params, list) and all(type(index) is int for index in params)
