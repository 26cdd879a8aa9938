"""A run's state in the layout of ``torch.optim.Optimizer.state_dict``: flat keys, tensors and plain values only.

Beside the base optimizer's own entries, the state of each coordinates' index holds ``subspace.*``: the step, the number of
refreshes, the transform's state, and what the ledger holds. Each param group says what the run is: format, mode, base, carry,
seed, compat, specs and parameter names; all of it must be equal to load. Coordinates themselves are model weights: zero, and
nowhere, in optimizer mode; in the model's ``state_dict`` in adapter mode, or, with ``self_contained``, here, beside the weights
they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import CheckpointError
from lingrad.optimizers.base import Base
from lingrad.subspaces import trees as trees
from lingrad.subspaces.ledger import Ledger
from lingrad.subspaces.subspace import Subspace
from lingrad.weights.base import MergeLoss

FORMAT = 3
PREFIX = "subspace."


class Loaded(NamedTuple):
    """What a checkpoint holds for one parameter.

    Args:
        moments: The base optimizer's entries.
        step: Steps finished; None for a parameter without a subspace.
        state: The transform's state.
        refreshes: Refreshes committed.
        merged: Whether anything was merged.
        ledger: The ledger, where the run has one.
        loss: What merges have lost, where the weight is quantised.
        stored: Coordinates and the tensors of the weight, where the state holds them; not copied.
    """

    moments: dict[str, Any]
    step: int | None = None
    state: Any = None
    refreshes: int = 0
    merged: bool = False
    ledger: Ledger | None = None
    loss: MergeLoss | None = None
    stored: Mapping[str, Tensor] = MappingProxyType({})


def pack(sub: Subspace, step: int, stored: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Any]:
    """The flat entries of one subspace.

    Args:
        sub: The subspace.
        step: Steps finished.
        stored: Tensors of the model that belong to the state.

    Returns:
        ``subspace.step``, ``.refreshes``, ``.merged``, the weight's ``.m`` and ``.n``, ``subspace.state.*``, ``.ledger.*``,
        ``.loss.*`` and ``.stored.*``.
    """
    m, n = sub.layout.shape
    numbers = {"step": step, "refreshes": sub.refreshes, "merged": sub.merged, "m": m, "n": n}
    tree = {**numbers, "state": sub.state, "stored": stored, "loss": sub.loss}
    tree["ledger"] = sub.ledger.pack() if sub.ledger is not None else None
    return trees.flatten(tree, PREFIX.rstrip("."))


def unpack(
    entries: Mapping[str, Any],
    param: Tensor,
    name: str,
    sub: Subspace | None,
    base: Base,
    stored: Mapping[str, Tensor] = MappingProxyType({}),
) -> Loaded:
    """Read one index of a checkpoint, changing nothing.

    Args:
        entries: Its flat entries.
        param: The parameter, or the coordinates.
        name: Its name.
        sub: Its subspace, if it has one.
        base: The base that steps it.
        stored: Tensors of the model that belong to the state.

    Returns:
        Copies in the dtypes they were saved in, where the base keeps them: step counters may be on the CPU.

    Raises:
        CheckpointError: An entry is missing, or of another type, dtype or shape.
    """
    loaded = Loaded({})
    if sub is not None:
        own = pack(sub, 0)
        step, refreshes, merged, *shape = (
            trees.checked(own[f"{PREFIX}{key}"], entries, f"{PREFIX}{key}", name)
            for key in ("step", "refreshes", "merged", "m", "n")
        )
        if tuple(shape) != sub.layout.shape:
            raise CheckpointError(f"{name} is {tuple(shape)} in the checkpoint, and {sub.layout.shape} in this run")
        ledger = None
        if sub.ledger is not None:
            prefix = f"{PREFIX}ledger."
            flat = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
            ledger = sub.ledger.unpack(flat, (sub.leader or sub).state, param, name)
        found = {key: trees.checked(like, entries, f"{PREFIX}stored.{key}", name) for key, like in stored.items()}
        state = trees.restore(sub.state, entries, f"{PREFIX}state", name)
        loss = trees.restore(sub.loss, entries, f"{PREFIX}loss", name)
        loaded = Loaded({}, step, state, refreshes, merged, ledger, loss, found)
    moments = {key: value for key, value in entries.items() if not key.startswith(PREFIX)}
    fresh = base.memory(param) if moments else {}  # none where the parameter has had no gradient yet
    for key, like in fresh.items():
        trees.checked(like, moments, key, name)
    return loaded._replace(moments=placed(moments, fresh, param.device))


def placed(memory: Mapping[str, Any], like: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A base's entries for one parameter on the devices where it keeps them.

    Args:
        memory: The entries, on any device.
        like: What the base keeps of such a parameter.
        device: The parameter's, for entries that ``like`` does not have.

    Returns:
        Copies.
    """
    places = {key: value.device for key, value in like.items() if isinstance(value, Tensor)}
    return {key: trees.copied(value, places.get(key, device)) for key, value in memory.items()}


def check_layout(state_dict: Any) -> None:
    """Make sure that a state dict is an optimizer's.

    Args:
        state_dict: Whatever was loaded.

    Raises:
        CheckpointError: It is something else.
    """
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
        held = list(state_dict)[:3] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise CheckpointError(
            f"this is no optimizer's state_dict, which has 'state' and 'param_groups', but {held}; "
            "pass what opt.state_dict() gave, not the whole file or a model's"
        )


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]], identity: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says it is with what a run is.

    Args:
        saved: The checkpoint's param groups.
        own: The run's.
        identity: What the run is beside its groups: format, mode, base, carry, seed, compat.

    Raises:
        CheckpointError: They differ; the first difference is named.
    """
    older = [was["format"] for was in saved if was.get("format", identity["format"]) != identity["format"]]
    if older:
        raise CheckpointError(f"the checkpoint has format {older[0]!r}, this run has {identity['format']!r}")
    for key in identity:
        if any(key not in was for was in saved):
            raise CheckpointError(f"the checkpoint's param groups have no '{key}': it was not written by lingrad's optimizer")
    if len(saved) != len(own):
        raise CheckpointError(f"the checkpoint has {len(saved)} param groups and this run {len(own)}")
    for was, now in zip(saved, own, strict=True):
        for key, new in identity.items():
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
