"""A run's state saved and loaded; what the entries are is in `lingrad.engine.saved`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad import parallel
from lingrad.adapters import Attachment
from lingrad.engine.refresh import look_ahead
from lingrad.engine.run import Run
from lingrad.engine.saved import ENERGY, FORMAT, NOT_MEASURED, PREFIX, Saved, check_groups, check_values, read_ledger
from lingrad.errors import CheckpointError
from lingrad.optimizers import Base
from lingrad.optimizers.hooks import without_global_hooks
from lingrad.subspaces import trees
from lingrad.subspaces.ledger import Ledger
from lingrad.subspaces.sealing import sealed
from lingrad.subspaces.watched import was_written
from lingrad.tensors import is_sharded, same_memory
from lingrad.weights.base import MergeLoss, Weight


class Entries(NamedTuple):
    """What a checkpoint holds for one parameter.

    Args:
        moments: The base optimizer's entries.
        step: Steps finished; None for a parameter without a subspace.
        state: The transform's state; None where another weight has it, with which this one shares its basis.
        refreshes: Refreshes committed.
        energy: |S S^T G| / |G| of the last refresh, where it was measured.
        ledger: The ledger; None for a parameter without a subspace.
        loss: What merges have lost, where the weight is quantised.
        stored: Coordinates and the tensors of the weight, where the state holds them; not copied.
        outer: The momentum of the outer step of a decentralised run.
        ended: Steps finished at the end of its last round.
        residual: What is kept of the part of the gradient that its basis drops.
        rounding: How often the weight was rounded, and what is kept of it.
        schedule: What the schedule of its basis remembers.
    """

    moments: dict[str, Any]
    step: int | None = None
    state: Any = None
    refreshes: int = 0
    energy: float | None = None
    ledger: Ledger | None = None
    loss: MergeLoss | None = None
    stored: Mapping[str, Tensor] = MappingProxyType({})
    outer: Tensor | None = None
    ended: int = 0
    residual: Mapping[str, Tensor] = MappingProxyType({})
    rounding: Mapping[str, Any] = MappingProxyType({})
    schedule: Mapping[str, Any] = MappingProxyType({})


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint must agree on with a run, besides the groups, by the keys of a param group."""
    base = run.stepper.base
    kind = None if base.quantizer is None else base.quantizer.kind
    # codes of '8bit' and '8bit_linear' are bytes alike, and mean other numbers
    name = base.name if kind in (None, "8bit") else f"{base.name}(moments={kind})"
    return {"format": FORMAT, "mode": run.mode, "base": name, **run.settings.identity()}


def state(run: Run) -> defaultdict[Tensor, dict[str, Any]]:
    """What the base and the subspaces keep, by parameter; a copy of the mapping, for reading."""
    merged = defaultdict(dict, {param: dict(entries) for param, entries in run.stepper.state.items()})
    if run.step or run.stepper.state:
        for attachment in run.attachments:
            merged[attachment.sub.coords].update(_pack(run, attachment))
    return merged


def save(run: Run) -> dict[str, Any]:
    """The state of a run in torch's layout.

    Args:
        run: The run.

    Returns:
        ``state`` by index, with ``subspace.*`` next to the base's entries, and ``param_groups``.
    """
    index, groups = 0, []
    for group in run.groups:
        indices = list(range(index, index + len(group["params"])))
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": indices})
        index += len(indices)
    states: dict[Any, dict[str, Any]] = {}
    for index, named in enumerate(run.named()):
        entries = dict(run.stepper.state.get(named.param, {}))
        if named.attachment is not None:
            entries.update(_pack(run, named.attachment))
        if entries:
            states[index] = entries
    return {"state": states, "param_groups": groups}


@torch.no_grad()
@without_global_hooks()
def load(run: Run, state_dict: dict[str, Any]) -> None:
    """Resume from a saved state; nothing is changed unless all of it fits.

    Args:
        run: The run.
        state_dict: What `save` gave, in this format or the one before. Raises `CheckpointError` at the first difference.
    """
    saved = Saved(state_dict)
    own = identity(run)
    fixed = own.keys() | set()
    if saved.upgraded:
        own["base"] = run.stepper.base.name  # that format does not tell the kinds of 8-bit moments apart
    contained = all(group.get("self_contained") is True for group in saved.groups)
    if run.mode == "optimizer" or (run.settings.self_contained and not contained):
        del own["self_contained"]  # of no effect in optimizer mode; else the model's state has the coordinates
    check_groups(saved.groups, run.groups, own)
    check_values(saved.groups)
    indices = [index for group in saved.groups for index in group["params"]]
    found = []
    for named, index in zip(run.named(), indices, strict=True):
        base = run.stepper.base_of(named.group["kind"])
        stored = _stored(run, named.attachment) if named.attachment is not None and contained else {}
        entries = _unpack(run, saved.state.get(index, {}), named.param, named.name, named.attachment, base, stored)
        found.append((named, stored, entries))
    run.outer.clear()
    run.stepper.load([(named.param, entries.moments) for named, _, entries in found])
    for named, stored, entries in found:
        if named.attachment is None or entries.step is None or entries.ledger is None:
            continue
        sub = named.attachment.sub
        if run.of(sub.basis)[0] is named.attachment:
            sub.basis.replace(entries.state, entries.refreshes)
            sub.basis.energy = entries.energy
        if sub.basis.cadence is not None:
            sub.basis.cadence.load(entries.schedule, sub.name, sub.coords)
        sub.ledger, sub.weight.loss = entries.ledger, entries.loss
        for key, tensor in entries.stored.items():
            if not same_memory(tensor, stored[key]):  # as in accelerate's load_state_dict(state_dict())
                stored[key].copy_(tensor)
        if stored:
            was_written(sub.weight.param)  # by this; it and the coordinates belong together
        sub.coords.grad = None  # of weights and a basis that are replaced
        run.ended, run.failed = entries.ended, None
        if entries.outer is not None:
            run.outer[sub.name] = entries.outer
        if run.residuals is not None:
            run.residuals.load(sub, entries.residual)
        if sub.weight.rounding is not None:
            sub.weight.rounding.load(entries.rounding, sub.weight.param.device)
        run.step = entries.step
    for group, was in zip(run.groups, saved.groups, strict=True):
        group.update({key: trees.copied(value) for key, value in was.items() if key != "params" and key not in fixed})
    look_ahead(run)  # a redraw that was due had happened before the state was saved
    if run.layerwise is not None:
        run.layerwise.begin()


def _stored(run: Run, attachment: Attachment) -> dict[str, Tensor]:
    """What of the model the state holds too: in adapter mode, where it is to be complete, coordinates and weights."""
    if not run.settings.self_contained or run.mode != "adapter":
        return {}
    return {"coords": attachment.sub.coords.detach(), **attachment.sub.weight.state()}


def _pack(run: Run, attachment: Attachment) -> dict[str, Any]:
    """The flat entries of one weight: ``subspace.step``, ``.refreshes``, ``.state.*`` and so on."""
    sub, basis = attachment.sub, attachment.sub.basis
    m, n = sub.weight.layout.shape
    first = run.of(basis)[0] is attachment
    numbers = {"step": run.step, "refreshes": basis.refreshes, "merged": sub.ledger.merged, "m": m, "n": n}
    # a number always: what restores a flattened state asks for the keys that the run has now
    energy = NOT_MEASURED if basis.energy is None else basis.energy
    of_basis = {"state": basis.state, "energy": energy} if first else {}
    # what loads the model's state writes into the shards, which cannot be put elsewhere: this one must not share their memory
    stored = {key: one.clone() if is_sharded(one) else one for key, one in _stored(run, attachment).items()}
    if basis.cadence is not None:
        of_basis["schedule"] = basis.cadence.entries(sub.name, sub.coords, first=first)
    tree = {**numbers, **of_basis, "stored": stored, "loss": sub.weight.loss, "outer": run.outer.get(sub.name)}
    if run.residuals is not None:
        tree["residual"] = run.residuals.entries(sub)
    if sub.weight.rounding is not None:
        tree["rounding"] = sub.weight.rounding.entries()
    if run.settings.rounds is not None:
        tree |= {"ended": run.ended, "worker": run.settings.rounds.workers.number}
    ledger = sub.ledger.pack()
    if ledger is not None and parallel.initialized():
        ledger = sealed(ledger, sub.coords)
    return trees.flatten({**tree, "ledger": ledger}, PREFIX.rstrip("."))


def _unpack(
    run: Run,
    entries: Mapping[str, Any],
    param: Tensor,
    name: str,
    attachment: Attachment | None,
    base: Base,
    stored: Mapping[str, Tensor],
) -> Entries:
    """Read one index of a checkpoint, changing nothing: copies in the dtypes they were saved in, where the base keeps them."""
    moments = {key: value for key, value in entries.items() if not key.startswith(PREFIX)}
    fresh = base.state_of(param) if moments else {}  # none where the parameter has had no gradient yet
    for key, template in fresh.items():
        trees.checked(template, moments, key, name)
    for key, value in moments.items():
        if isinstance(value, Tensor):
            trees.require_values(value, f"'{key}' of {name}")
    count = moments.get("step", 0)
    single = isinstance(count, int | float) or (isinstance(count, Tensor) and count.numel() == 1)
    if single and not 0 <= float(count) < torch.inf:
        raise CheckpointError(f"'step' of {name} is {float(count)} in the checkpoint; expected 0 or more")
    found = Entries(run.stepper.stowed(trees.placed(moments, fresh, param.device)))
    if attachment is None:
        return found
    sub, basis = attachment.sub, attachment.sub.basis
    rounds, outer, ended = run.settings.rounds, None, 0
    if rounds is not None and f"{PREFIX}worker" in entries:
        ended, worker = (trees.checked(0, entries, f"{PREFIX}{key}", name) for key in ("ended", "worker"))
        if worker != rounds.workers.number:
            raise CheckpointError(
                f"this is the checkpoint of worker {worker}, whose coordinates and moments are of its own slice, and this is "
                f"worker {rounds.workers.number}: load its own, or join by TorchftWorkers"
            )
    kinds = {"step": 0, "refreshes": 0, "merged": False, "m": 0, "n": 0}
    step, refreshes, merged, *shape = (trees.checked(v, entries, f"{PREFIX}{key}", name) for key, v in kinds.items())
    if min(step, refreshes) < 0:
        raise CheckpointError(f"{name} has step {step} and {refreshes} refreshes in the checkpoint; expected 0 or more")
    if tuple(shape) != sub.weight.layout.shape:
        raise CheckpointError(f"{name} is {tuple(shape)} in the checkpoint, and {sub.weight.layout.shape} in this run")
    ledger = Ledger(basis.transform)
    if sub.ledger.records:
        ledger = read_ledger(basis.transform, entries, basis.state, param, name)
        if sub.ledger.on_host:
            ledger.stow()
    ledger.merged = merged
    residual = {} if run.residuals is None else run.residuals.entries(sub)
    residual = {key: trees.checked(like, entries, f"{PREFIX}residual.{key}", name) for key, like in residual.items()}
    for key, kept in residual.items():
        if not bool(kept.isfinite().all()) or (key == "norm" and bool(kept < 0)):
            raise CheckpointError(
                f"'{PREFIX}residual.{key}' of {name} has values that no run leaves; give an earlier checkpoint"
            )
    first = run.of(basis)[0] is attachment
    schedule: dict[str, Any] = {}
    if basis.cadence is not None:
        remembered = basis.cadence.entries(sub.name, sub.coords, first=first)
        schedule = trees.restore(remembered, entries, f"{PREFIX}schedule", name)
        basis.cadence.check(schedule, name)
    restored = trees.restore(basis.state, entries, f"{PREFIX}state", name) if first else None
    if not all(bool(leaf.isfinite().all()) for leaf in trees.tensors(restored) if leaf.is_floating_point()):
        raise CheckpointError(f"the basis of {name} has values that are not finite in the checkpoint; give an earlier one")
    energy = trees.checked(0.0, entries, ENERGY, name) if first else NOT_MEASURED
    if rounds is not None and rounds.momentum and f"{PREFIX}outer" in entries:
        like = torch.zeros(sub.weight.layout.shape, dtype=sub.coords.dtype, device=param.device)
        outer = trees.restore(like, entries, f"{PREFIX}outer", name)
    return found._replace(
        step=step,
        refreshes=refreshes,
        state=restored,
        energy=None if energy == NOT_MEASURED else energy,
        ledger=ledger,
        loss=trees.restore(sub.weight.loss, entries, f"{PREFIX}loss", name),
        stored={key: trees.checked(template, entries, f"{PREFIX}stored.{key}", name) for key, template in stored.items()},
        outer=outer,
        ended=ended,
        residual=residual,
        rounding=_read_rounding(sub.weight, entries, name),
        schedule=schedule,
    )


def _read_rounding(weight: Weight, entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries that `Rounding.load` takes."""
    if weight.rounding is None:
        return {}
    count, error = f"{PREFIX}rounding.count", f"{PREFIX}rounding.error"
    found = {"count": trees.checked(0, entries, count, name)}
    if found["count"] < 0:
        raise CheckpointError(f"'{count}' of {name} is {found['count']} in the checkpoint; expected 0 or more")
    if weight.rounding.kind == "compensated" and found["count"]:
        found["error"] = trees.checked(weight.rounding.like(weight.matrix), entries, error, name)
    return found
