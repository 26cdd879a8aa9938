"""Param groups: what the user passed, sorted into coordinates, matrices and vectors, and mirrored to the stock optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad.adapters import refuse_attached
from lingrad.config import spec
from lingrad.config.rules import Rules
from lingrad.config.targets import Plan, resolve_model, resolve_parameters
from lingrad.engine.arithmetic import Arithmetic
from lingrad.errors import SpecError, did_you_mean, require
from lingrad.optimizers.base import Base
from lingrad.subspaces.subspace import Subspace

Named = tuple[str, nn.Parameter]
Trainable = nn.Module | Iterable[Named] | Iterable[dict[str, Any]]
Pairs = list[tuple[dict[str, Any], dict[str, Any]]]

KINDS = ("coords", "matrices", "vectors")

# Of a param group, what the stock optimizer must not get as it is: ours, settled when it was built, or rewritten in `push`.
_OWN = {"params", "param_names", "name", "kind", "scale", "specs", "weight_decay", "lr", "eps", "fused", "foreach"}


def resolve_groups(model: Trainable, rules: Rules) -> list[tuple[Plan, dict[str, Any]]]:
    """Resolve what the user passed, group by group.

    Args:
        model: A model, named parameters, or dicts with named ``params``, an optional ``spec``, and hyper-parameters.
        rules: The spec or rules of groups that bring none of their own.

    Returns:
        A plan and the hyper-parameters of each group; one group for a model.

    Raises:
        SpecError: The parameters have no names, or one is given twice, or none trains.
    """
    if isinstance(model, nn.Module):
        for module_name, module in model.named_modules():
            for attribute, param in module.named_parameters(recurse=False):
                refuse_attached(f"{module_name}.{attribute}" if module_name else attribute, param, module)
        return [(resolve_model(model, rules), {})]
    items: list[Any] = list(model) if isinstance(model, Iterable) else [model]
    groups = items if items and all(isinstance(item, dict) and "params" in item for item in items) else [{"params": items}]
    resolved: list[tuple[Plan, dict[str, Any]]] = []
    seen: set[object] = set()
    for group in groups:
        options = {key: value for key, value in group.items() if key not in ("params", "spec")}
        named = list(group["params"])
        for item in named:
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)):
                raise SpecError(
                    "expected a model, model.named_parameters(), or groups {'params': ..., 'spec': ...} whose params are "
                    f"(name, parameter) pairs, since seeds, rules and checkpoints refer to names; not {_short(item)}"
                )
            refuse_attached(*item)
            for what, key in (("parameter", id(item[1])), ("name", item[0])):
                if key in seen:
                    raise SpecError(f"the {what} '{item[0]}' is given twice")
                seen.add(key)
        resolved.append((resolve_parameters(named, cast("Rules", group.get("spec", rules))), options))
    if not any(plan.targets or plan.full for plan, _ in resolved):
        raise SpecError("nothing to train: no parameter was given that requires a gradient")
    return resolved


def make_groups(
    plan: Plan,
    subs: list[Subspace],
    options: Mapping[str, Any],
    *,
    base: Base,
    arithmetic: Arithmetic,
    defaults: Mapping[str, Any],
    prefix: str,
) -> list[dict[str, Any]]:
    """The param groups of one group of the user's: coords, matrices and vectors, those that are not empty.

    Args:
        plan: What happens to its parameters.
        subs: The subspaces of its targets.
        options: Hyper-parameters the user gave for it.
        base: The base of the coordinates; its own hyper-parameters are in every group it steps.
        arithmetic: Details of the step.
        defaults: ``weight_decay`` and ``scale`` where the user's group has none.
        prefix: Goes before the groups' names.

    Returns:
        Dicts as ``torch.optim.Optimizer`` takes them.

    Raises:
        SpecError: An option is none of the base's, or would have no effect.
    """
    named: dict[str, list[Named]] = {
        "coords": [(sub.name, sub.coords) for sub in subs],
        "matrices": [(name, param) for name, param in plan.full if param.dim() >= 2],
        "vectors": [(name, param) for name, param in plan.full if param.dim() < 2],
    }
    if "scale" in options and not subs:
        raise SpecError("'scale' has no effect in a param group of which nothing is transformed; leave it out", option="scale")
    for option in ("fused", "foreach"):
        require(option not in options, option, f"'{option}' is one choice for the whole run; pass it to lingrad.wrap")
    for option in ("lr", "weight_decay", "scale"):
        check_not_negative(option, options.get(option, 0.0))
    known: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        if named[kind]:
            known[kind] = {**_hyper_parameters(base if kind == "coords" else base.rest or base), **defaults}
            if arithmetic.default_eps is not None and "eps" not in base.options:
                known[kind]["eps"] = arithmetic.default_eps
            if kind != "coords":
                del known[kind]["scale"]
    for option in options:
        if not any(option in group for group in known.values()):
            all_known = {key for group in known.values() for key in group}
            raise SpecError(f"unknown option '{option}' in a param group{did_you_mean(option, all_known)}", option=option)
    groups = []
    for kind, hyper in known.items():
        hyper |= {key: value for key, value in options.items() if key in hyper}
        group = {"params": named[kind], "name": prefix + kind, "kind": kind, **hyper}
        groups.append(group | {"specs": [spec.format(sub.transform) for sub in subs]} if kind == "coords" else group)
    return groups


def pull(own: dict[str, Any], stock: Mapping[str, Any]) -> None:
    """Copy what a stock optimizer keeps in its param group, such as a step size it found, back to ours.

    Args:
        own: Our group, changed in place.
        stock: The stock optimizer's.
    """
    own.update({key: stock[key] for key in stock.keys() - _OWN})


def push(own: Mapping[str, Any], stock: dict[str, Any], arithmetic: Arithmetic, step: int) -> None:
    """Copy a param group's hyper-parameters, which schedulers change, to the stock optimizer's.

    Args:
        own: Our group.
        stock: The stock optimizer's, changed in place.
        arithmetic: Details of the step.
        step: The step about to be made, counted from 1.
    """
    for key in stock.keys() - _OWN:
        if key in own:
            stock[key] = own[key]
    if "eps" in stock:
        stock["eps"] = arithmetic.eps(own, step)
    stock["lr"] = own["lr"] * own.get("scale", 1.0)


def build_stock(own: list[dict[str, Any]], base: Base, state: Any) -> list[tuple[Optimizer, Pairs]]:
    """Build the stock optimizers behind a run: one, or two where the base cannot step what is not a matrix.

    Args:
        own: Our param groups.
        base: The base of the coordinates.
        state: Our state, which the stock optimizers share.

    Returns:
        Each optimizer with the pairs (our group, its group) it serves; that of the coordinates first.
    """
    served = [(base, own)]
    if base.rest is not None:
        coords = [group for group in own if group["kind"] == "coords"]
        served = [(base, coords), (base.rest, [group for group in own if group["kind"] != "coords"])]
    stocks: list[tuple[Optimizer, Pairs]] = []
    for which, groups in served:
        if groups:
            optimizer = which.build([{"params": group["params"]} for group in groups])
            for param, initial in optimizer.state.items():
                if not state.get(param):
                    state[param] = initial
            optimizer.state = state
            stocks.append((optimizer, list(zip(groups, optimizer.param_groups, strict=True))))
    return stocks


def check_not_negative(option: str, value: Any) -> None:
    """Make sure that a hyper-parameter is a finite number, 0 or more; a 0-d tensor will do."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    fits = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf
    require(fits, option, f"{option} must be a number, 0 or more, not {value!r}")


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) < 80 else f"a {type(item).__name__}"


def _hyper_parameters(base: Base) -> dict[str, Any]:
    """What a stock optimizer has in its groups, with the user's options; learnt from one built on a parameter of no use."""
    group = base.build([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    return {key: value for key, value in group.items() if key != "params"}
