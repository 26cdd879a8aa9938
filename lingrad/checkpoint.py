"""A run's state in the layout of ``torch.optim.Optimizer.state_dict``: flat keys, tensors and plain values only.

Beside the base optimizer's own entries, the state of each coordinates' index holds ``subspace.*``: the step, the number of
refreshes and the transform's state. Each param group says what the run is: format, mode, base, carry, seed, compat, specs and
parameter names; all of it must be equal to load. Coordinates themselves are model weights: zero, and nowhere, in optimizer
mode; in the model's ``state_dict`` in adapter mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import CheckpointError
from lingrad.subspace import Subspace

FORMAT = 1
PREFIX = "subspace."


class Loaded(NamedTuple):
    """What a checkpoint holds for one parameter.

    Args:
        moments: The base optimizer's entries.
        step: Steps finished; None for a parameter without a subspace.
        state: The transform's state.
        refreshes: Refreshes committed.
    """

    moments: dict[str, Any]
    step: int | None = None
    state: Any = None
    refreshes: int = 0


def pack(sub: Subspace, step: int) -> dict[str, Any]:
    """The flat entries of one subspace.

    Args:
        sub: The subspace.
        step: Steps finished.

    Returns:
        ``subspace.step``, ``subspace.refreshes`` and ``subspace.state.*``.
    """
    return {f"{PREFIX}step": step, f"{PREFIX}refreshes": sub.refreshes, **_flatten(sub.state, f"{PREFIX}state")}


def unpack(entries: Mapping[str, Any], param: Tensor, name: str, sub: Subspace | None) -> Loaded:
    """Read one index of a checkpoint, changing nothing.

    Args:
        entries: Its flat entries.
        param: The parameter, or the coordinates.
        name: Its name.
        sub: Its subspace, if it has one.

    Returns:
        Copies on the parameter's device, in the dtypes they were saved in.

    Raises:
        CheckpointError: An entry is missing or has another shape.
    """
    moments = {key: _copy(value, param.device) for key, value in entries.items() if not key.startswith(PREFIX)}
    for key, value in moments.items():
        if isinstance(value, Tensor) and value.dim() == param.dim() and value.numel() > 1 and value.shape != param.shape:
            raise CheckpointError(
                f"'{key}' of {name} is {tuple(value.shape)} in the checkpoint, and {tuple(param.shape)} in this run"
            )
    if sub is None:
        return Loaded(moments)
    step, refreshes = (int(_entry(entries, f"{PREFIX}{key}", name)) for key in ("step", "refreshes"))
    return Loaded(moments, step, _restore(sub.state, entries, f"{PREFIX}state", name), refreshes)


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]], identity: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says it is with what a run is.

    Args:
        saved: The checkpoint's param groups.
        own: The run's.
        identity: What the run is beside its groups: format, mode, base, carry, seed, compat.

    Raises:
        CheckpointError: They differ; the first difference is named.
    """
    if len(saved) != len(own):
        raise CheckpointError(f"the checkpoint has {len(saved)} param groups and this run {len(own)}")
    for was, now in zip(saved, own, strict=True):
        for key, new in identity.items():
            if key not in was:
                raise CheckpointError(
                    f"the checkpoint's param groups have no '{key}': it was not written by lingrad's optimizer"
                )
            if was[key] != new:
                remedy = "; call opt.switch first" if key == "mode" else ""
                raise CheckpointError(f"the checkpoint has {key} {was[key]!r}, this run has {new!r}{remedy}")
        if len(was["params"]) != len(now["params"]):
            raise CheckpointError(
                f"group '{now['name']}': the checkpoint has {len(was['params'])} params, this run has {len(now['params'])}"
            )
        for key in ("param_names", "specs"):
            old, new = was.get(key, []), now.get(key, [])
            if len(old) != len(new):
                raise CheckpointError(f"group '{now['name']}': the checkpoint has {len(old)} {key}, this run has {len(new)}")
            for i, (a, b) in enumerate(zip(old, new, strict=True)):
                if a != b:
                    raise CheckpointError(
                        f"group '{now['name']}', entry {i}: the checkpoint has {key[:-1]} '{a}', this run has '{b}'"
                    )


def _entry(entries: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in entries:
        raise CheckpointError(f"the checkpoint has no '{key}' for {name}")
    return entries[key]


def _copy(value: Any, device: torch.device) -> Any:
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
    if isinstance(like, Mapping):  # what an optimizer keeps, empty before its first step
        return {
            k[len(key) + 1 :]: _copy(v, v.device) if isinstance(v, Tensor) else v
            for k, v in flat.items()
            if k.startswith(f"{key}.")
        }
    value = _entry(flat, key, name)
    if not isinstance(like, Tensor):
        return type(like)(value)
    if not isinstance(value, Tensor) or value.shape != like.shape:
        was = tuple(value.shape) if isinstance(value, Tensor) else value
        raise CheckpointError(f"'{key}' of {name} is {was} in the checkpoint, and {tuple(like.shape)} in this run")
    return value.detach().clone().to(device=like.device, dtype=like.dtype)
