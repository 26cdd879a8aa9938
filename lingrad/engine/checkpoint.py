"""The state of a run in the layout of ``torch.optim.Optimizer.state_dict``: flat keys, tensors and plain values only.

Next to the base optimizer's own entries, the state of each coordinates' index holds ``subspace.*``: the step, the number of
refreshes, the transform's state, and what the ledger records; of weights that share a basis the first one has its state. Each
param group says what the run is: format, mode, base, settings, specs and parameter names; all of it must be equal to load.
Coordinates themselves are model weights: zero, and stored nowhere, in optimizer mode; in the model's ``state_dict`` in adapter
mode, or, with ``self_contained``, here, next to the weights they belong to.

This is the one place that knows the format. `Saved` reads a state without a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from lingrad.adapters import Attachment
from lingrad.engine.identity import check_groups, identity
from lingrad.engine.refresh import look_ahead
from lingrad.engine.run import Run
from lingrad.engine.stepper import placed
from lingrad.errors import CheckpointError
from lingrad.optimizers import Base
from lingrad.subspaces import trees
from lingrad.subspaces.ledger import Ledger
from lingrad.transforms import Transform
from lingrad.weights.base import MergeLoss

FORMAT = 4
PREFIX = "subspace."
ENERGY = f"{PREFIX}energy"

# What format 3 called some entries: the ends of keys, behind the prefix.
_RENAMED = {"state.left_memory.": "state.left_optimizer.", "state.right_memory.": "state.right_optimizer."}


class Entries(NamedTuple):
    """What a checkpoint holds for one parameter.

    Args:
        moments: The base optimizer's entries.
        step: Steps finished; None for a parameter without a subspace.
        state: The transform's state; None where another weight has it, with which this one shares its basis.
        refreshes: Refreshes committed.
        energy: |S S^T G| / |G| of the last refresh, where it was measured.
        ledger: The ledger.
        loss: What merges have lost, where the weight is quantised.
        stored: Coordinates and the tensors of the weight, where the state holds them; not copied.
    """

    moments: dict[str, Any]
    step: int | None = None
    state: Any = None
    refreshes: int = 0
    energy: float | None = None
    ledger: Ledger | None = None
    loss: MergeLoss | None = None
    stored: Mapping[str, Tensor] = MappingProxyType({})


def state(run: Run) -> defaultdict[Tensor, dict[str, Any]]:
    """What the base and the subspaces keep, by parameter; a copy of the mapping, for reading."""
    merged = defaultdict(dict, {param: dict(entries) for param, entries in run.stepper.state.items()})
    if run.step or run.stepper.state:
        for attachment in run.attachments:
            merged[attachment.sub.coords].update(_pack(run, attachment))
    return merged


def save(run: Run, packed: dict[str, Any]) -> dict[str, Any]:
    """Complete a state dict with what the run knows.

    Args:
        run: The run.
        packed: What torch's own ``state_dict`` gives of it.

    Returns:
        The same, with ``subspace.*``.
    """
    for index, named in enumerate(run.named()):
        if named.attachment is not None:
            packed["state"].setdefault(index, {}).update(_pack(run, named.attachment))
    return packed


def load(run: Run, state_dict: dict[str, Any]) -> None:
    """Resume from a saved state; nothing is changed unless all of it fits.

    Args:
        run: The run.
        state_dict: What `save` gave, in this format or the one before. Raises `CheckpointError` at the first difference.
    """
    saved = Saved(state_dict)
    own = identity(run, FORMAT)
    check_groups(saved.groups, run.groups, own)
    indices = [index for group in saved.groups for index in group["params"]]
    found = []
    for named, index in zip(run.named(), indices, strict=True):
        base = run.stepper.base_of(named.group["kind"])
        stored = {} if named.attachment is None else _stored(run, named.attachment)
        entries = _unpack(run, saved.state.get(index, {}), named.param, named.name, named.attachment, base, stored)
        found.append((named, stored, entries))
    run.stepper.load([(named.param, entries.moments) for named, _, entries in found])
    for named, stored, entries in found:
        if named.attachment is None or entries.step is None:
            continue
        sub = named.attachment.sub
        if run.of(sub.basis)[0] is named.attachment:
            sub.basis.replace(entries.state, entries.refreshes)
            sub.basis.energy = entries.energy
        sub.ledger, sub.weight.loss = entries.ledger or sub.ledger, entries.loss
        for key, tensor in entries.stored.items():
            if tensor.data_ptr() != stored[key].data_ptr():  # as in accelerate's load_state_dict(state_dict())
                stored[key].copy_(tensor)
        sub.coords.grad = None  # of weights and a basis that are replaced
        run.step = entries.step
    for group, was in zip(run.groups, saved.groups, strict=True):
        group.update({key: value for key, value in was.items() if key != "params" and key not in own})
    look_ahead(run)  # a redraw that was due had happened before the state was saved
    if run.layerwise is not None:
        run.layerwise.begin()


class Saved:
    """A state dict of a run, checked for its layout, in the present format; reading it needs no run.

    Args:
        state_dict: What ``opt.state_dict()`` gave. Not changed.

    Attributes:
        state: Entries by index.
        groups: Param groups, each with ``kind``, ``param_names`` and, of coordinates, ``specs``.

    Raises:
        CheckpointError: It is no optimizer's state dict.
    """

    def __init__(self, state_dict: Any) -> None:
        if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
            held = list(state_dict)[:3] if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise CheckpointError(
                f"this is no optimizer's state_dict, which has 'state' and 'param_groups', but {held}; "
                "pass what opt.state_dict() gave, not the whole file or a model's"
            )
        upgraded = upgrade(state_dict)
        self.state: Mapping[Any, Mapping[str, Any]] = upgraded["state"]
        self.groups: list[dict[str, Any]] = upgraded["param_groups"]

    @property
    def is_run(self) -> bool:
        """Whether it was written by lingrad's optimizer."""
        return bool(self.groups) and all("kind" in group and "param_names" in group for group in self.groups)

    def of_run(self, key: str) -> Any:
        """What the first param group says of the run: ``format``, ``mode``, ``share`` and so on; None where it does not."""
        return self.groups[0].get(key)

    def names(self, *, coords: bool) -> dict[str, Any]:
        """The parameters that are transformed, or those that train in full.

        Args:
            coords: Which of the two.

        Returns:
            Name -> index.

        Raises:
            CheckpointError: A group does not name each of its parameters.
        """
        found: dict[str, Any] = {}
        for group in self.groups:
            texts = [group["param_names"], *([group.get("specs")] if group["kind"] == "coords" else [])]
            if any(not isinstance(text, list) or len(text) != len(group["params"]) for text in texts):
                raise CheckpointError("it is damaged: a param group does not name each parameter")
            if (group["kind"] == "coords") is coords:
                found |= dict(zip(group["param_names"], group["params"], strict=True))
        return found

    def specs(self) -> dict[str, str]:
        """The config string of every transformed parameter."""
        groups = (group for group in self.groups if group["kind"] == "coords")
        return {name: text for group in groups for name, text in zip(group["param_names"], group["specs"], strict=True)}

    def entries(self, name: str) -> Mapping[str, Any]:
        """The entries of one parameter."""
        every = self.names(coords=True) | self.names(coords=False)
        return self.state.get(every[name], {})


def upgrade(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict of format 3 in the present one; any other as it is.

    Format 3 had no ``energy``, and other names for a learned basis's optimizer state and for decay in a ledger.

    Args:
        state_dict: ``state`` and ``param_groups``; not changed.

    Returns:
        The state dict; tensors are not copied.
    """
    groups = state_dict["param_groups"]
    if not groups or any(not isinstance(group, Mapping) or group.get("format") != 3 for group in groups):
        return state_dict
    found = {index: {_renamed(key): value for key, value in entries.items()} for index, entries in state_dict["state"].items()}
    return {**state_dict, "state": found, "param_groups": [{**group, "format": FORMAT} for group in groups]}


def written(*, step: int, refreshes: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that replace those of a fresh run, for a run of another program that is to be resumed.

    Args:
        step: Steps finished.
        refreshes: Refreshes that led to the state.
        state: Leaves of the transform's state by name.

    Returns:
        Key -> value.
    """
    leaves = {f"{PREFIX}state.{key}": value for key, value in state.items()}
    return {f"{PREFIX}step": step, f"{PREFIX}refreshes": refreshes, **leaves}


def read_ledger(transform: Transform, entries: Mapping[str, Any], template: Any, coords: Tensor, name: str) -> Ledger:
    """The ledger among a parameter's entries.

    Args:
        transform: Its transform.
        entries: The entries.
        template: A state of the transform.
        coords: Coordinates of the weight.
        name: The weight's name, for messages.

    Returns:
        The ledger, which records. Raises `CheckpointError` where an entry is missing or of another kind.
    """
    prefix = f"{PREFIX}ledger."
    flat = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    return Ledger.unpack(transform, flat, template, coords, name)


def _renamed(key: str) -> str:
    if not key.startswith(PREFIX):
        return key
    for old, new in _RENAMED.items():
        key = key.replace(f"{PREFIX}{old}", f"{PREFIX}{new}")
    is_decay = key.startswith(f"{PREFIX}ledger.") and key.endswith(".kept")
    return key.removesuffix("kept") + "decay" if is_decay else key


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
    of_basis = {"state": basis.state, "energy": basis.energy} if first else {}
    tree = {**numbers, **of_basis, "stored": _stored(run, attachment), "loss": sub.weight.loss}
    return trees.flatten({**tree, "ledger": sub.ledger.pack()}, PREFIX.rstrip("."))


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
    found = Entries(placed(moments, fresh, param.device))
    if attachment is None:
        return found
    sub, basis = attachment.sub, attachment.sub.basis
    kinds = {"step": 0, "refreshes": 0, "merged": False, "m": 0, "n": 0}
    step, refreshes, merged, *shape = (trees.checked(v, entries, f"{PREFIX}{key}", name) for key, v in kinds.items())
    if tuple(shape) != sub.weight.layout.shape:
        raise CheckpointError(f"{name} is {tuple(shape)} in the checkpoint, and {sub.weight.layout.shape} in this run")
    ledger = Ledger(basis.transform)
    if sub.ledger.records:
        ledger = read_ledger(basis.transform, entries, basis.state, param, name)
    ledger.merged = merged
    first = run.of(basis)[0] is attachment
    return found._replace(
        step=step,
        refreshes=refreshes,
        state=trees.restore(basis.state, entries, f"{PREFIX}state", name) if first else None,
        energy=trees.checked(0.0, entries, ENERGY, name) if ENERGY in entries else None,
        ledger=ledger,
        loss=trees.restore(sub.weight.loss, entries, f"{PREFIX}loss", name),
        stored={key: trees.checked(template, entries, f"{PREFIX}stored.{key}", name) for key, template in stored.items()},
    )
