"""Which parameters decay: some of a param group only, where names decide."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lingrad.engine.optimizer import SubspaceOptimizer


def exempt_from_decay(optimizer: SubspaceOptimizer, decaying: Collection[str]) -> None:
    """Part the param groups so that some parameters do not decay.

    The Trainer decays no norms and no biases, by name and type. What decays stays in its group; the rest goes to one of the
    same hyper-parameters without decay, called ``<name>.undecayed`` where the group is parted.

    Args:
        optimizer: An optimizer that has made no step.
        decaying: Names of the parameters that decay.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        kept = [i for i, name in enumerate(group["param_names"]) if name in decaying]
        others = [i for i in range(len(group["params"])) if i not in set(kept)]
        if kept:
            groups.append({**group, **_part(group, kept)})
        if others:
            name = f"{group['name']}.undecayed" if kept else group["name"]
            groups.append({**group, **_part(group, others), "name": name, "weight_decay": 0.0})
    optimizer.param_groups = groups


def _part(group: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    by_parameter = [key for key in ("params", "param_names", "specs") if key in group]
    return {key: [group[key][i] for i in indices] for key in by_parameter}
