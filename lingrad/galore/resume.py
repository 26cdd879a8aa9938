"""Resuming a galore_torch run: its bases and moments become the state of a `lingrad.SubspaceOptimizer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.config.settings import Mode
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.engine.saved import resumed_entries
from lingrad.errors import CheckpointError, require_one_of
from lingrad.files.optimizer_file import Inert, load_state
from lingrad.files.reading import all_finite
from lingrad.galore.arguments import GaloreTargets
from lingrad.galore.names import MOMENTS, PROJECTOR, SIDES
from lingrad.weights.layout import is_conv1d

_TAKEN = ("lr", "betas", "eps", "weight_decay", "initial_lr")  # options of a param group that are taken over


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint of galore_torch has of one parameter.

    Args:
        name: The parameter's name.
        group: Its param group.
        entries: Its state; empty where it never had a gradient.
        spec: Its transform; None if it was trained in full.
        left: Its left basis [m, r].
        right: Its right basis [n, r].
        scale: GaLore's scale.
    """

    name: str
    group: dict[str, Any]
    entries: dict[str, Any]
    spec: str | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 1.0


def from_galore(
    path: str | Path,
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    mode: Mode = "optimizer",
    *,
    names: Sequence[str] | None = None,
    **options: Any,
) -> SubspaceOptimizer:
    """Resume a run of galore_torch's AdamW: the next steps are those that galore_torch would have made, in either mode.

    The projector objects in the file are read as plain attributes; nothing in it is executed.

    Args:
        path: ``optimizer.pt``, or the checkpoint's folder: of transformers' Trainer with ``optim="galore_adamw"``, or a file
            written by ``torch.save(optimizer.state_dict(), path)`` for a ``galore_torch.GaLoreAdamW``.
        model: The model with the weights of that checkpoint. It is wrapped.
        target_modules: The Trainer's ``optim_target_modules``. It defines the order of the parameters in the file: first those
            that are not targets, then the targets, each in the model's order.
        mode: ``optimizer`` or ``adapter``.
        names: The names of all parameters in the order of the optimizer's groups, instead of ``target_modules``, for an
            optimizer with groups of its own.
        **options: For `lingrad.wrap` or `lingrad.adapt`: ``ledger``, ``stagger`` and so on. Learning rate, betas, eps, decay,
            rank, gap, scale and sides are taken from the file.

    Returns:
        The optimizer, with ``compat="galore"``, at the step the file was saved at.

    Raises:
        CheckpointError: The file is not that of such a run or of this model, or asks to run code; the message says which.
        DataError: There is no such file.
        SpecError: An option is wrong.
    """
    require_one_of(mode, ("optimizer", "adapter"), "mode")
    saved = load_state(Path(path), [PROJECTOR])
    params = dict(model.named_parameters())
    ordered = _order(saved["param_groups"], params, model, target_modules, names)
    found = [_read(saved, model, name, group, index) for name, group, index in ordered]
    found = [one for one in found if params[one.name].requires_grad or one.entries]
    step = _one({one.entries["step"] for one in found if one.entries}, "step")
    for one in found:
        if not params[one.name].requires_grad:
            raise CheckpointError(f"'{one.name}' was trained in the file and is frozen in the model; call requires_grad_(True)")
    targets = [one for one in found if one.spec is not None]
    rules: dict[str, Any] = {one.name: one.spec for one in targets}
    optimizer = SubspaceOptimizer(
        model,
        rules,
        "adamw",
        mode=mode,
        scale=_one({one.scale for one in targets}, "scale"),
        **{"compat": "galore", **options},
    )
    try:
        _fill(optimizer, found, step)
    except BaseException:
        optimizer.detach()
        raise
    return optimizer


def _order(
    groups: list[dict[str, Any]],
    params: dict[str, nn.Parameter],
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    names: Sequence[str] | None,
) -> list[tuple[str, dict[str, Any], int]]:
    """Name, group and index of each parameter in the file."""
    if (names is None) == (target_modules is None):
        raise CheckpointError("the file has no names: give target_modules, as for the Trainer, or names, one of the two")
    indices = [(group, index) for group in groups for index in group["params"]]
    if names is None:
        if ["rank" in group for group in groups] != [False, True]:
            kinds = ["galore" if "rank" in group else "plain" for group in groups]
            raise CheckpointError(
                f"the file has the param groups {kinds}, the Trainer's has ['plain', 'galore']; give names, the name of each "
                "parameter in the order of the groups"
            )
        chosen = _targets(model, target_modules or ())
        names = [*(name for name in params if name not in chosen), *(name for name in params if name in chosen)]
        counts = [len(group["params"]) for group in groups]
        if counts != [len(params) - len(chosen), len(chosen)]:
            raise CheckpointError(
                f"the file has {counts[1]} projected parameters and {counts[0]} others; in this model target_modules="
                f"{target_modules!r} selects {len(chosen)} and leaves {len(params) - len(chosen)}: another model or selection"
            )
    unknown = [name for name in names if name not in params]
    if unknown or len(set(names)) != len(names) or len(names) != len(indices):
        odd = f"'{unknown[0]}' is not a parameter of the model" if unknown else f"{len(set(names))} different names were given"
        raise CheckpointError(f"the file has {len(indices)} parameters; {odd}")
    return [(name, group, index) for name, (group, index) in zip(names, indices, strict=True)]


def _targets(model: nn.Module, modules: str | Sequence[str]) -> set[str]:
    """The weights that the Trainer's ``optim_target_modules`` selects."""
    return set(GaloreTargets("", modules if isinstance(modules, str) else tuple(modules))(model))


def _read(saved: dict[str, Any], model: nn.Module, name: str, group: dict[str, Any], index: int) -> _Saved:
    """The entries of one parameter, checked against the model."""
    entries, param = saved["state"].get(index, {}), model.get_parameter(name)
    if group.get("correct_bias", True) is not True:
        raise CheckpointError("the run had correct_bias=False, which no base optimizer of lingrad supports")
    if not entries and "rank" not in group:
        return _Saved(name, group, {})
    if "exp_avg" not in entries or "exp_avg_sq" not in entries:
        reason = (
            "no moments: the Trainer saves nothing of a layerwise run"
            if not entries
            else f"{sorted(map(str, entries))}: an 8-bit or Adafactor state, which cannot be resumed exactly"
        )
        raise CheckpointError(f"the file has for '{name}' {reason}; expected exp_avg and exp_avg_sq of galore_torch's AdamW")
    if type(entries.get("step")) is not int:
        raise CheckpointError(
            f"the 'step' of '{name}' in the file is not a whole number; expected a state of galore_torch's AdamW"
        )
    spec, left, right, scale, shape = None, None, None, 1.0, tuple(param.shape)
    if "rank" in group:
        if is_conv1d(model.get_submodule(name.rpartition(".")[0])) or param.dim() != 2:
            raise CheckpointError(f"'{name}' is not a matrix [out, in], and galore_torch reads such a weight differently")
        spec, left, right, scale = _basis(name, entries.get("projector"), (shape[0], shape[1]))
        sides = [basis.shape[1] if basis is not None else size for basis, size in zip((left, right), shape, strict=True)]
        shape = (sides[0], sides[1])
    tensors = {key: entries[key] for key in MOMENTS} | {"left basis": left, "right basis": right}
    for key, value in tensors.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        numbers = dense and value.is_floating_point() and all_finite(value)
        if not (numbers or (value is None and key not in entries)):
            raise CheckpointError(f"'{key}' of '{name}' is not a tensor of finite numbers; give an earlier checkpoint")
    if not 0 <= entries["step"] < 2**53:
        raise CheckpointError(f"the 'step' of '{name}' in the file is {entries['step']}; it counts steps: 0 or more")
    if bool((entries["exp_avg_sq"] < 0).any()):
        raise CheckpointError(f"'exp_avg_sq' of '{name}' is negative somewhere, and is a mean of squares; give another file")
    for key in MOMENTS:
        if tuple(entries[key].shape) != shape:
            raise CheckpointError(
                f"'{key}' of '{name}' is {tuple(entries[key].shape)} in the file; expected {shape}: it is another model, or "
                "another selection or order of its parameters"
            )
    return _Saved(name, group, entries, spec, left, right, scale)


def _basis(name: str, projector: Any, shape: tuple[int, int]) -> tuple[str, Tensor | None, Tensor | None, float]:
    """The transform, the bases and the scale of a projector."""
    fields = vars(projector) if isinstance(projector, Inert) else {}
    kind, found = fields.get("proj_type"), fields.get("ortho_matrix")
    stored = found if isinstance(found, list) else [found]
    bases = [basis for basis in stored if isinstance(basis, Tensor) and basis.dim() == 2]
    numbers = [fields.get(key) for key in ("rank", "update_proj_gap", "scale")]
    known = all(isinstance(number, int | float) for number in numbers)
    if not known or len(bases) != len(stored) or not isinstance(kind, str) or kind not in SIDES:
        raise CheckpointError(f"the file has no projector of galore_torch for '{name}'")
    m, n = shape
    side = {"std": "right" if m >= n else "left", "reverse_std": "left" if m >= n else "right"}.get(kind, kind)
    left, right = None, None
    if side == "full" and len(bases) == 2:
        left, right = bases[0], bases[1].t()
    elif len(bases) == 1:
        left, right = (bases[0], None) if side == "left" else (None, bases[0].t())
    sizes = [None if basis is None else basis.shape[0] for basis in (left, right)]
    rank = min(fields["rank"], m, n)
    if sizes != [m if side != "right" else None, n if side != "left" else None] or any(
        basis is not None and basis.shape[1] != rank for basis in (left, right)
    ):
        raise CheckpointError(
            f"the projector of '{name}' has bases for {sizes} rows and columns, rank {fields['rank']}, the weight is {m} x {n}"
            ": it is another model, or another selection or order of its parameters"
        )
    spec = f"svd(rank={fields['rank']}, every={fields['update_proj_gap']}, side={SIDES[kind]}, clip=true)"
    return spec, left, right, float(fields["scale"])


def _fill(optimizer: SubspaceOptimizer, found: list[_Saved], step: int) -> None:
    """Load the file's state into an optimizer."""
    by_name = {one.name: one for one in found}
    fresh = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    indices = [index for group in fresh["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for name, index, param in zip(names, indices, params, strict=True):
        one, entries = by_name[name], fresh["state"].setdefault(index, {})
        if one.entries:
            moments = {key: one.entries[key].to(param.dtype) for key in MOMENTS}
            entries |= {"step": torch.tensor(float(step)), **moments}
        if one.spec is not None:
            every = int(one.spec.partition("every=")[2].partition(",")[0])
            bases = {side: basis for side, basis in (("left", one.left), ("right", one.right)) if basis is not None}
            state = {side: basis.contiguous() for side, basis in bases.items()}
            entries |= resumed_entries(step=step, refreshes=-(-step // every) if every else 1, state=state)
    for group in fresh["param_groups"]:
        groups = [by_name[name].group for name in group["param_names"]]
        for key in _TAKEN:
            if not all(_is_option(was.get(key)) for was in groups):
                raise CheckpointError(f"'{key}' in the file's param groups is neither a number nor a pair of numbers")
            values = {tuple(v) if isinstance(v, list) else v for v in (was.get(key) for was in groups) if v is not None}
            if values:
                group[key] = _one(values, key)
    optimizer.load_state_dict(fresh)


def _is_option(value: Any) -> bool:
    numbers = value if isinstance(value, list | tuple) else [value]
    return all(number is None or type(number) in (int, float) for number in numbers)


def _one(values: set[Any], what: str) -> Any:
    """The value that all parameters share."""
    if len(values) != 1:
        found = ", ".join(map(str, sorted(values, key=lambda value: (type(value).__name__, value)))) or "none"
        raise CheckpointError(f"'{what}' must be one number for all parameters that train together; the file has {found}")
    return next(iter(values))
