"""The format of a checkpoint, and reading one without a run.

The state of a run has the layout of ``torch.optim.Optimizer.state_dict``: flat keys, tensors and plain values only. Next to the
base optimizer's own entries, the state of each coordinates' index holds ``subspace.*``: the step, the number of refreshes, the
transform's state, what its schedule remembers, and what the ledger records; of weights that share a basis the first one has its
state. Each param group says what the run is: format, mode, base, settings, specs and parameter names; all of it must be equal
to load. Coordinates themselves are model weights: zero, and stored nowhere, in optimizer mode; in the model's ``state_dict`` in
adapter mode, or, with ``self_contained``, in the state, next to the weights they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lingrad.config.settings import Settings, check_not_negative
from lingrad.config.sharing import GroupedTarget
from lingrad.errors import CheckpointError, SpecError, shown
from lingrad.maps.factors import Factors
from lingrad.subspaces import trees
from lingrad.subspaces.ledger import Ledger, total
from lingrad.subspaces.sealing import opened
from lingrad.tensors import wide
from lingrad.transforms import Transform

FORMAT = 4
PREFIX = "subspace."
ENERGY = f"{PREFIX}energy"
NOT_MEASURED = -1.0  # the energy of a basis that no refresh has measured
COORDS = f"{PREFIX}stored.coords"
_WORDS = {"param_names": "parameter", "specs": "config string"}


class Saved:
    """A state dict of a run, checked for its layout, in the present format; reading it needs no run.

    Args:
        state_dict: What ``opt.state_dict()`` gave. Not changed.

    Attributes:
        state: Entries by index.
        upgraded: Whether it was in the format before.
        groups: Param groups, each with ``kind``, ``param_names`` and, of coordinates, ``specs``.

    Raises:
        CheckpointError: It is no optimizer's state dict.
    """

    def __init__(self, state_dict: Any) -> None:
        if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
            held = list(state_dict)[:3] if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise CheckpointError(
                f"this is not an optimizer's state_dict: it needs 'state' and 'param_groups', and has {held}; "
                "pass what opt.state_dict() gave, not the whole file or a model's"
            )
        _check_layout(state_dict["state"], state_dict["param_groups"])
        upgraded = upgrade(state_dict)
        self.upgraded = upgraded is not state_dict
        self.state: Mapping[Any, Mapping[str, Any]] = upgraded["state"]
        # options that came later are None in files from before
        self.groups: list[dict[str, Any]] = [{"residual": None} | group for group in upgraded["param_groups"]]

    @property
    def is_run(self) -> bool:
        """Whether it was written by lingrad's optimizer."""
        return bool(self.groups) and all("kind" in group and "param_names" in group for group in self.groups)

    @property
    def formats(self) -> list[Any]:
        """The format that each param group says it has."""
        return [group.get("format") for group in self.groups]

    def of_run(self, key: str) -> Any:
        """What the first param group says of the run: ``mode``, ``share`` and so on; None where it does not."""
        return self.groups[0].get(key)

    def names(self, *, coords: bool) -> dict[str, Any]:
        """The parameters that are transformed, or those that train in full.

        Args:
            coords: Which of the two.

        Returns:
            Name -> config string of a transformed parameter, None of one that trains in full.

        Raises:
            CheckpointError: A group does not name each of its parameters.
        """
        found: dict[str, Any] = {}
        for group in self.groups:
            is_coords = group["kind"] == "coords"
            names, count = group["param_names"], len(group["params"])
            specs = group.get("specs") if is_coords else [None] * count
            if not (isinstance(names, list) and isinstance(specs, list)) or not len(names) == len(specs) == count:
                raise CheckpointError("a param group does not name each parameter")
            if is_coords is coords:
                found |= dict(zip(names, specs, strict=True))
        return found

    def entries(self, name: str) -> Mapping[str, Any]:
        """The entries of one parameter."""
        named = ((n, i) for group in self.groups for n, i in zip(group["param_names"], group["params"], strict=True))
        return self.state.get(dict(named)[name], {})

    def has_ledger(self, name: str) -> bool:
        """Whether the merges of a transformed parameter are recorded."""
        return any(key.startswith(f"{PREFIX}ledger.") for key in self.entries(name))

    def has_coords(self, name: str) -> bool:
        """Whether the coordinates of a transformed parameter are in the state."""
        return COORDS in self.entries(name)

    def change(self, weight: GroupedTarget, dtype: torch.dtype) -> tuple[Factors | None, float]:
        """What the run has made of one weight, from its ledger.

        Args:
            weight: The weight, with those that share its basis.
            dtype: Its dtype.

        Returns:
            The factors, None where nothing was added; and by what decay has multiplied the weight.

        Raises:
            CheckpointError: An entry is missing or of another kind.
        """
        name, transform, first = weight.target.name, weight.target.transform, weight.group[0].name
        entries = self.entries(name)
        template = transform.init(weight.shape, seed=0, device=torch.device("cpu"), dtype=dtype)
        coords = torch.zeros(weight.coords, dtype=wide(dtype))
        ledger = read_ledger(transform, entries, template, coords, name)
        if COORDS in entries:
            coords = trees.checked(coords, entries, COORDS, name)
        open_ = ledger.open(coords)
        last = None
        if open_.any():
            state = trees.restore(template, self.entries(first), f"{PREFIX}state", name)
            last = transform.map(state).factors(open_)
        return total(ledger.closed(), last), ledger.decay


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
    found = {index: _upgraded(entries) for index, entries in state_dict["state"].items()}
    return {**state_dict, "state": found, "param_groups": [{**group, "format": FORMAT} for group in groups]}


def resumed_entries(*, step: int, refreshes: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that replace those of a fresh run, to resume a run of another program.

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
    return Ledger.unpack(transform, opened(flat, name), template, coords, name)


def _upgraded(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of one parameter in the present format."""
    found = {_renamed(key): value for key, value in entries.items()}
    return found | ({ENERGY: NOT_MEASURED} if f"{PREFIX}step" in found else {})


def _renamed(key: str) -> str:
    is_decay = key.startswith(f"{PREFIX}ledger.") and key.endswith(".kept")
    return key.removesuffix("kept") + "decay" if is_decay else key


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]], identity: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says it is with what a run is.

    Args:
        saved: The checkpoint's param groups.
        own: The run's.
        identity: What `identity` gives of the run.

    Raises:
        CheckpointError: They differ; the first difference is named.
    """
    # a checkpoint from before an option was added had what is its default now
    saved = [{**Settings().identity(), **was} if {"format", "mode", "base"} <= was.keys() else was for was in saved]
    older = [was["format"] for was in saved if was.get("format", identity["format"]) != identity["format"]]
    if older:
        raise CheckpointError(f"the checkpoint has format {shown(older[0])}, this run has {identity['format']!r}")
    for key in identity:
        if any(key not in was for was in saved):
            raise CheckpointError(f"the checkpoint's param groups have no '{key}': it was not written by lingrad's optimizer")
    if len(saved) != len(own):
        coords = [sum(group.get("kind") == "coords" for group in groups) for groups in (saved, own)]
        norm = "; scale='norm' makes one for each factor: give the run the scale that the checkpoint's had" * (
            coords[0] != coords[1]
        )
        raise CheckpointError(f"the checkpoint has {len(saved)} param groups and this run {len(own)}{norm}")
    for was, now in zip(saved, own, strict=True):
        for key, new in identity.items():
            if was[key] != new:
                value = shown(was[key])
                remedy = f"call opt.switch({value}) before loading" if key == "mode" else f"make the run with {key}={value}"
                if key == "base" and "(moments=" in f"{value}{new}":  # no name of a base that could be passed
                    remedy = "make the run with the checkpoint's base and moments="
                raise CheckpointError(f"the checkpoint has {key} {value}, this run has {new!r}; {remedy}")
        if not isinstance(was.get("name", ""), str):
            raise CheckpointError(f"group '{now['name']}' is called {shown(was['name'])} in the checkpoint; expected a word")
        if len(was["params"]) != len(now["params"]):
            raise CheckpointError(
                f"group '{now['name']}': the checkpoint has {len(was['params'])} params, this run has {len(now['params'])}"
            )
        for key in ("param_names", "specs"):
            old, new = was.get(key, []), now.get(key, [])
            if not isinstance(old, list):
                raise CheckpointError(f"group '{now['name']}': {key} is {shown(old)} in the checkpoint; expected a list")
            if len(old) != len(new):
                raise CheckpointError(f"group '{now['name']}': the checkpoint has {len(old)} {key}, this run has {len(new)}")
            for i, (a, b) in enumerate(zip(old, new, strict=True)):
                if a != b:
                    raise CheckpointError(
                        f"group '{now['name']}', entry {i}: the checkpoint has {_WORDS[key]} {shown(a)}, this run has {b!r}"
                    )


def check_values(groups: list[dict[str, Any]]) -> None:
    """Make sure that the hyper-parameters of a checkpoint are numbers to train with.

    Args:
        groups: Its param groups.

    Raises:
        CheckpointError: One is not: NaN, negative, or no number.
    """
    for group in groups:
        try:
            for key in ("lr", "weight_decay", "scale", "eps"):
                value = group.get(key, 0.0)
                for number in value if key == "eps" and isinstance(value, (tuple, list)) else (value,):  # Adafactor's is a pair
                    check_not_negative(key, number)
        except SpecError as error:
            raise CheckpointError(f"group {shown(group.get('name'))} of the checkpoint: {error}") from None
        betas = group.get("betas", (0.0, 0.0))
        numbers = isinstance(betas, (tuple, list)) and all(
            isinstance(b, (int, float)) or (isinstance(b, Tensor) and b.numel() == 1) for b in betas
        )
        if not numbers or not all(0 <= float(b) < 1 for b in betas):
            raise CheckpointError(
                f"group {shown(group.get('name'))} of the checkpoint: betas must be 0 or more and below 1, not {shown(betas)}"
            )


def _check_layout(state: Any, groups: Any) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(entries, Mapping) for entries in state.values()):
        raise CheckpointError("the 'state' of this state_dict does not map indices to entries; pass what opt.state_dict() gave")
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups):
        raise CheckpointError("the 'param_groups' of this state_dict are no list of groups with 'params'")
    odd = next((key for entries in state.values() for key in entries if not isinstance(key, str)), None)
    if odd is not None:
        raise CheckpointError(f"an entry of this state_dict is called {shown(odd)}; expected a name")
