"""Param groups: what the user passed, sorted into coordinates, matrices and vectors, and mirrored to the stock optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lingrad import spec
from lingrad.bases import Base
from lingrad.compat import Arithmetic
from lingrad.errors import SpecError, did_you_mean
from lingrad.rules import Plan, Rules, resolve_model, resolve_parameters
from lingrad.subspace import Subspace

Named = tuple[str, nn.Parameter]
Trainable = nn.Module | Iterable[Named] | Iterable[dict[str, Any]]

# Of a param group, what is ours or was settled when the stock optimizer was built.
_OWN = {"params", "param_names", "name", "scale", "specs", "mode", "weight_decay", "lr", "eps", "fused", "foreach"}


def resolve_groups(model: Trainable, rules: Rules) -> list[tuple[Plan, dict[str, Any]]]:
    """Resolve what the user passed, group by group.

    Args:
        model: A model, named parameters, or dicts with named ``params``, an optional ``spec``, and hyper-parameters.
        rules: The spec or rules of groups that bring none of their own.

    Returns:
        A plan and the hyper-parameters of each group; one group for a model.

    Raises:
        SpecError: The parameters have no names, or a parameter is in two groups.
    """
    if isinstance(model, nn.Module):
        return [(resolve_model(model, rules), {})]
    items: list[Any] = list(model)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    resolved: list[tuple[Plan, dict[str, Any]]] = []
    seen: set[int] = set()
    for group in groups:
        options = {key: value for key, value in group.items() if key not in ("params", "spec")}
        named = list(group["params"])
        for item in named:
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
                raise SpecError(
                    "parameters must come with their names, which seeds, rules and checkpoints refer to: "
                    "pass the model, model.named_parameters(), or groups whose params are (name, parameter) pairs"
                )
            if id(item[1]) in seen:
                raise SpecError(f"the parameter '{item[0]}' is given twice")
            seen.add(id(item[1]))
        resolved.append((resolve_parameters(named, cast("Rules", group.get("spec", rules))), options))
    return resolved


@dataclass
class Hyper:
    """What goes into every param group: the base's own hyper-parameters and ours.

    Args:
        base: The base of the coordinates.
        weight_decay: Decoupled decay.
        scale: Factor on the learning rate of coordinates.
        mode: The mode, for checkpoints to compare.
        arithmetic: Details of the step.
    """

    base: Base
    weight_decay: float
    scale: float
    mode: str
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    def group(self, name: str, named: list[Named], options: Mapping[str, Any], subs: list[Subspace]) -> dict[str, Any]:
        """One param group.

        Args:
            name: Its name: coords, matrices or vectors.
            named: Its parameters.
            options: Hyper-parameters the user gave for it.
            subs: The subspaces behind it, for ``coords``.

        Returns:
            A dict as ``torch.optim.Optimizer`` takes it.

        Raises:
            SpecError: An option is not one of the base's.
        """
        base = self.base if subs or self.base.rest is None else self.base.rest
        known = {k: v for k, v in _defaults(base).items() if k != "params"}
        if self.arithmetic.default_eps is not None and "eps" not in self.base.options:
            known["eps"] = self.arithmetic.default_eps
        known |= {"weight_decay": self.weight_decay}
        if subs:
            known |= {"scale": self.scale, "specs": [spec.format(sub.transform) for sub in subs]}
        mine = {key: value for key, value in options.items() if subs or key != "scale"}
        for option in mine:
            if option not in known or option == "specs":
                raise SpecError(f"unknown option '{option}' in a param group{did_you_mean(option, known)}", option=option)
        return {"params": named, "name": name, "mode": self.mode, **known, **mine}


def _defaults(base: Base) -> dict[str, Any]:
    """The hyper-parameters a stock optimizer puts into its groups, with the user's options; built on nothing that matters."""
    return dict(base.build([nn.Parameter(torch.zeros(2, 2))]).param_groups[0])


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


def build_stock(own: list[dict[str, Any]], base: Base, state: Any) -> list[tuple[Optimizer, list[tuple[Any, Any]]]]:
    """Build the stock optimizers behind a run: one, or two where the base cannot step what is not a matrix.

    Args:
        own: Our param groups.
        base: The base of the coordinates.
        state: Our state, which the stock optimizers share.

    Returns:
        Each optimizer with the pairs (our group, its group) it serves.
    """
    served: list[tuple[Base, list[dict[str, Any]]]] = [(base, own)]
    if base.rest is not None:
        served = [(base, [g for g in own if "specs" in g]), (base.rest, [g for g in own if "specs" not in g])]
    stocks = []
    for which, groups in served:
        if groups:
            optimizer = which.build([{"params": g["params"]} for g in groups])
            optimizer.state = state
            stocks.append((optimizer, list(zip(groups, optimizer.param_groups, strict=True))))
    return stocks
