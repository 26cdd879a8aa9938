"""A transform's state as a tree: NamedTuples and dicts whose leaves are tensors, numbers and None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import CheckpointError


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """The leaves by dotted names.

    Args:
        value: A state.
        key: The name of its root.

    Returns:
        Name -> tensor or plain value; None leaves are left out.
    """
    if value is None:
        return {}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in flatten(item, f"{key}.{name}").items()}
    return {key: value}


def restore(like: Any, flat: Mapping[str, Any], key: str, owner: str) -> Any:
    """The value that `flatten` named ``key``.

    Args:
        like: A state of the same kind, whose shapes, dtypes and devices are taken.
        flat: Leaves by name.
        key: The name of its root.
        owner: Whose state it is, for messages.

    Returns:
        A state that shares no memory with ``flat``.

    Raises:
        CheckpointError: A leaf is missing or has another shape.
    """
    if like is None:
        return None
    if hasattr(like, "_asdict"):
        return type(like)(*(restore(item, flat, f"{key}.{field}", owner) for field, item in like._asdict().items()))
    if isinstance(like, Mapping):  # what an optimizer keeps, empty before its first step
        return {k[len(key) + 1 :]: copied(v) for k, v in flat.items() if k.startswith(f"{key}.")}
    value = entry(flat, key, owner)
    if not isinstance(like, Tensor):
        return type(like)(value)
    if not isinstance(value, Tensor) or value.shape != like.shape:
        was = tuple(value.shape) if isinstance(value, Tensor) else value
        raise CheckpointError(f"'{key}' of {owner} is {was} in the checkpoint, and {tuple(like.shape)} in this run")
    return copied(value).to(device=like.device, dtype=like.dtype)


def moved(value: Any, device: torch.device) -> Any:
    """The state with its tensors on a device, in the dtypes they have."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(*(moved(item, device) for item in value)) if hasattr(value, "_asdict") else value


def tensors(value: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in flatten(value).values() if isinstance(leaf, Tensor)]


def entry(flat: Mapping[str, Any], key: str, owner: str) -> Any:
    """One leaf by name; raises `CheckpointError` where there is none."""
    if key not in flat:
        raise CheckpointError(f"the checkpoint has no '{key}' for {owner}")
    return flat[key]


def copied(value: Any, device: torch.device | None = None) -> Any:
    """A leaf, a tensor in memory of its own."""
    return value.detach().clone().to(device or value.device) if isinstance(value, Tensor) else value
