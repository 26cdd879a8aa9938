"""A run's state in the layout of ``torch.optim.Optimizer.state_dict``: flat keys, tensors and plain numbers only.

Beside the base optimizer's own entries, the state of each coordinates' index holds ``subspace.*``: the step, the number of
refreshes and the transform's state. Coordinates themselves are model weights: zero, and nowhere, in optimizer mode; in the
model's ``state_dict`` in adapter mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import CheckpointError
from lingrad.subspace import Subspace

PREFIX = "subspace."
_FIXED = ("name", "param_names", "specs", "mode")  # of a param group: what must be equal to load


def pack_subspace(sub: Subspace, step: int) -> dict[str, Any]:
    """The flat entries of one subspace.

    Args:
        sub: The subspace.
        step: Steps finished.

    Returns:
        ``subspace.step``, ``subspace.refreshes`` and ``subspace.state.*``.
    """
    return {
        f"{PREFIX}step": step,
        f"{PREFIX}refreshes": sub.refreshes,
        **_flatten(sub.state, f"{PREFIX}state"),
    }


def unpack_subspace(sub: Subspace, flat: Mapping[str, Any]) -> tuple[Any, int]:
    """Read back what `pack_subspace` wrote.

    Args:
        sub: The subspace it goes to; not changed.
        flat: The entries of its index.

    Returns:
        The transform's state and the number of refreshes.

    Raises:
        CheckpointError: An entry is missing or has another shape.
    """
    key = f"{PREFIX}refreshes"
    if key not in flat:
        raise CheckpointError(f"the checkpoint has no '{key}' for {sub.name}: it was not written by lingrad's optimizer")
    return _restore(sub.state, flat, f"{PREFIX}state", sub.name), int(flat[key])


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Compare a checkpoint's param groups with a run's.

    Args:
        saved: Of the checkpoint.
        own: Of the run.

    Raises:
        CheckpointError: They differ in number, names, specs or mode; the first difference is named.
    """
    if len(saved) != len(own):
        raise CheckpointError(f"the checkpoint has {len(saved)} param groups and this run {len(own)}")
    for was, now in zip(saved, own, strict=True):
        for key in _FIXED:
            old, new = was.get(key), now.get(key)
            if isinstance(old, list | tuple) and isinstance(new, list | tuple):
                if len(old) != len(new):
                    raise CheckpointError(
                        f"group '{now['name']}': the checkpoint has {len(old)} {key}, this run has {len(new)}"
                    )
                for i, (a, b) in enumerate(zip(old, new, strict=True)):
                    if a != b:
                        raise CheckpointError(
                            f"group '{now['name']}', entry {i}: the checkpoint has {key[:-1]} '{a}', this run has '{b}'"
                        )
            elif old != new:
                remedy = "; call opt.switch first" if key == "mode" else ""
                raise CheckpointError(f"group '{now['name']}': the checkpoint has {key} '{old}', this run has '{new}'{remedy}")


def to_device(value: Any, device: torch.device) -> Any:
    """A copy of a state entry on a device, its dtype kept; numbers as they are."""
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value


def _flatten(value: Any, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flatten(item, f"{key}.{name}").items()}
    return {key: value}


def _restore(like: Any, flat: Mapping[str, Any], key: str, name: str) -> Any:
    """The value that `_flatten` wrote under ``key``, of the kind of ``like``."""
    if like is None:
        return None
    if hasattr(like, "_asdict"):
        return type(like)(*(_restore(item, flat, f"{key}.{field}", name) for field, item in like._asdict().items()))
    if isinstance(like, Mapping):
        return {k[len(key) + 1 :]: to_device(v, _device(like, v)) for k, v in flat.items() if k.startswith(f"{key}.")}
    if key not in flat:
        raise CheckpointError(f"the checkpoint has no '{key}' for {name}")
    value = flat[key]
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or value.shape != like.shape:
            was = tuple(value.shape) if isinstance(value, Tensor) else value
            raise CheckpointError(f"'{key}' of {name} is {was} in the checkpoint, and {tuple(like.shape)} in this run")
        return value.detach().clone().to(device=like.device, dtype=like.dtype)
    return type(like)(value)


def _device(like: Mapping[str, Any], value: Any) -> torch.device:
    tensors = [t for t in like.values() if isinstance(t, Tensor)]
    return tensors[0].device if tensors else getattr(value, "device", torch.device("cpu"))
