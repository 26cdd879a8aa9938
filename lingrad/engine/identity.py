"""What a run is, for a checkpoint to agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lingrad.engine.run import Run
from lingrad.errors import CheckpointError


def identity(run: Run, number: int) -> dict[str, Any]:
    """What a checkpoint must agree on with a run, besides the groups.

    Args:
        run: The run.
        number: The number of the checkpoint's format.

    Returns:
        Format, mode, base and settings, by the keys of a param group.
    """
    return {"format": number, "mode": run.mode, "base": run.stepper.base.name, **run.settings.identity()}


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]], identity: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says it is with what a run is.

    Args:
        saved: The checkpoint's param groups.
        own: The run's.
        identity: What `identity` gives of the run.

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
