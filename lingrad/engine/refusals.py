"""What a run refuses before anything is changed: options that would have no effect, and what sharded weights do not support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lingrad.adapters import Attachment
from lingrad.config import spec
from lingrad.config.cutting import check_cut
from lingrad.config.settings import Mode, Settings
from lingrad.config.targets import Plan
from lingrad.engine.checkpoint import identity
from lingrad.engine.run import Run
from lingrad.errors import ModeError, SpecError, require
from lingrad.optimizers import Base
from lingrad.parallel import initialized
from lingrad.subspaces.subspace import Subspace
from lingrad.weights.dense import DenseWeight
from lingrad.weights.sharding import LayerSharding


def check_effective(
    settings: Settings,
    mode: Mode,
    attachments: Sequence[Attachment],
    plans: Sequence[tuple[Plan, Mapping[str, Any]]],
) -> None:
    """Refuse options that would have no effect, and weights that do not support the mode.

    Args:
        settings: The options.
        mode: The mode that the run is to start in.
        attachments: The connections to the model.
        plans: What happens to the parameters, and the hyper-parameters that were given for them, by param group.
    """
    defaults = Settings()
    for option in ("scale", "carry", "residual"):
        idle = getattr(settings, option) != getattr(defaults, option) and not attachments
        require(not idle, option, f"'{option}' has no effect where nothing is transformed; leave it out")
    taken = any(plan.full and given.keys().isdisjoint(("lr", "rest_lr")) for plan, given in plans)
    require(
        settings.rest_lr is None or taken,
        "rest_lr",
        "'rest_lr' has no effect where nothing trains in full, or only param groups do that have a learning rate of their own; "
        "leave it out",
    )
    for part in settings.offloaded - {"moments"} if not attachments else ():
        require(
            False, "offload", f"offload='{settings.offload}': where nothing is transformed there is no '{part}'; leave it out"
        )
    for attachment in attachments:
        attachment.require(mode)
        sub = attachment.sub
        require(
            settings.residual is None or (isinstance(sub.weight, DenseWeight) and sub.weight.sharding is None),
            "residual",
            f"residual='{settings.residual}' adds matrices as large as {sub.name} to it in steps, and that is stored "
            "in 4 or 8 bits, or cut over processes; leave residual out",
        )
    require(
        settings.rounding == "nearest" or any(attachment.sub.weight.rounding for attachment in attachments),
        "rounding",
        f"rounding='{settings.rounding}' is for weights in 16 or 8 bits, and none that is transformed is; leave it out",
    )
    quantised = any(attachment.sub.weight.loss is not None for attachment in attachments)
    require(
        quantised or not settings.keep_remainder,
        "keep_remainder",
        "keep_remainder is for weights that are stored in 4 or 8 bits, and none that is transformed is; leave it out",
    )
    require(
        settings.merge_every is None or not quantised,
        "merge_every",
        "merge_every merges more often than refreshes do, and a merge into a quantised weight loses what is smaller than a "
        "step of its grid; leave it out",
    )


def check_base(base: Base) -> None:
    """Refuse a base that spreads its own state over processes.

    Args:
        base: The base of the coordinates.

    Raises:
        SpecError: It is torch's ZeroRedundancyOptimizer.
    """
    factory: Any = base.factory
    made = factory if isinstance(factory, type) or not initialized() else type(base.build([nn.Parameter(torch.zeros(1, 1))]))
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in getattr(made, "__mro__", ())):
        raise SpecError(
            "ZeroRedundancyOptimizer keeps the moments of a parameter in one process only, and refreshes and checkpoints of a "
            "run need them where its coordinates are; pass the optimizer inside it as the base, and shard weights, coordinates "
            "and moments by fully_shard"
        )


def check_sharded(settings: Settings, base: Base, attachments: Sequence[Attachment]) -> None:
    """Refuse what the shards of a weight do not support.

    Args:
        settings: The options.
        base: The base of the coordinates.
        attachments: The connections to the model.

    Raises:
        SpecError: Moments are coded in blocks, which shards would cut; weights are stepped inside the backward; the base cannot
            step DTensors.
        ModeError: Some weights only are cut; a map cannot be cut.
    """
    subs = [attachment.sub for attachment in attachments]
    cut = [sub for sub in subs if sub.weight.sharding is not None]
    if not cut:
        return
    parts = [sub for sub in cut if isinstance(sub.weight.sharding, LayerSharding)]
    if parts:
        _check_parts(subs)
    elif len(cut) < len(subs):
        left = next(sub for sub in subs if sub.weight.sharding is None)
        raise ModeError(
            f"{left.name} is not sharded, and {cut[0].name} is: its gradient would be another in each process. Call "
            "fully_shard(model) on the whole model after its layers, without ignored_params; or leave it out by a rule: 'none'"
        )
    else:
        for sub in cut:  # raises where the map has no part, which the first merge would find out
            sub.map().part(slice(0, 0), torch.zeros(sub.coords.shape, device=sub.coords.device))
    check_cut(base.name, coded=base.quantizer is not None, layerwise=settings.layerwise, offload=settings.offload)
    try:
        base.state_of(cut[0].coords)
    except Exception as error:  # other code
        raise SpecError(
            f"base '{base.name}' cannot step sharded parameters (DTensors): {error}. Use one of torch's, such as adamw"
        ) from error


def _check_parts(subs: Sequence[Subspace]) -> None:
    """Make sure that under tensor parallelism a part of the coordinates belongs to a part of each weight."""
    bases: dict[int, Subspace] = {}
    for sub in subs:
        first = bases.setdefault(id(sub.basis), sub)
        if (first.weight.sharding is None) != (sub.weight.sharding is None):
            raise ModeError(
                f"{first.name} and {sub.name} share a basis, and tensor parallelism has cut one of them only; parallelize "
                "both, leave share out, or leave one of the weights out by a rule: 'none'"
            )
        if sub.weight.sharding is None:
            continue
        by_rows, current = sub.weight.sharding.dim == 0, sub.map()
        if not (current if by_rows else current.T).aligned:
            cut, style, side = ("rows", "ColwiseParallel", "right") if by_rows else ("columns", "RowwiseParallel", "left")
            transform: Any = sub.basis.transform
            one_sided = (
                spec.format(replace(transform, side=side)) if hasattr(transform, "side") else f"svd(rank=64, side={side})"
            )
            raise ModeError(
                f"{sub.name} {list(sub.weight.layout.shape)} is cut by {cut} ({style}), and the basis of "
                f"'{spec.format(transform)}' is not on the {side} side alone: a part of the weight would need all of the "
                f"coordinates. Give such weights side={side} by a rule: {{'*{sub.name.rpartition('.')[0].rpartition('.')[2]}': "
                f"'{one_sided}', ...}}"
            )


def check_equal(run: Run, mode: Mode) -> None:
    """Make sure that all processes of a run train the same in the same way, before one waits for what another never sends.

    Args:
        run: The run, with its groups.
        mode: The mode that it is to start in.

    Raises:
        ModeError: They do not.
    """
    if run.processes.count == 1:
        return
    lines = [f"{key}={value!r}" for key, value in {**identity(run), "mode": mode}.items()]
    for group in run.groups:
        plain = {key: value for key, value in group.items() if key not in ("fused", "foreach")}  # these are for devices
        lines += [f"{key}={value!r}" for key, value in plain.items() if type(value) in (int, float, bool, str, tuple)]
        specs = iter(group.get("specs", ()))
        for name, param in zip(group["param_names"], group["params"], strict=True):
            attachment = run.attachment_of(param)
            shape = param.shape if attachment is None else attachment.sub.weight.layout.weight_shape
            lines.append(f"{name} {list(shape)} in {str(param.dtype).removeprefix('torch.')}: {next(specs, 'in full')}")
    run.processes.require_equal(lines, run.groups[0]["params"][0].device)
