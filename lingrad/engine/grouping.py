"""The param groups of a run: coordinates, matrices and vectors, with the hyper-parameters of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lingrad.config import spec
from lingrad.config.settings import check_not_negative, check_scale
from lingrad.config.targets import Plan
from lingrad.engine.arithmetic import Arithmetic
from lingrad.engine.stepper import Group
from lingrad.errors import SpecError, did_you_mean, require, shown
from lingrad.optimizers import Base, checks
from lingrad.optimizers.moments import steps_grow
from lingrad.subspaces import trees
from lingrad.subspaces.subspace import Subspace

KINDS = ("coords", "matrices", "vectors")


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
        defaults: ``weight_decay``, ``scale`` and ``rest_lr`` where the user's group has none. A group's own ``lr`` is for all
            of it, unless it has a ``rest_lr`` too.
        prefix: Goes before the groups' names.

    Returns:
        Dicts as ``torch.optim.Optimizer`` takes them.

    Raises:
        SpecError: An option is none of the base's, or would have no effect.
    """
    named: dict[str, list[tuple[str, Tensor]]] = {
        "coords": [(sub.name, sub.coords) for sub in subs],
        "matrices": [(name, param) for name, param in plan.full if param.dim() >= 2],
        "vectors": [(name, param) for name, param in plan.full if param.dim() < 2],
    }
    idle = {} if subs else {"scale": "is transformed"}
    idle |= {} if plan.full else {"rest_lr": "trains in full"}
    idle |= {} if subs or plan.full else dict.fromkeys(options, "trains")
    for option, what in idle.items():
        why = f"'{option}' has no effect in a param group of which nothing {what}; leave it out"
        require(option not in options, option, why)
    for option in ("fused", "foreach"):
        require(option not in options, option, f"'{option}' is one choice for the whole run; pass it to lingrad.wrap")
    if "scale" in options:
        check_scale(options["scale"])
    for option in ("lr", "weight_decay", "rest_lr"):
        if option in options and not (option == "rest_lr" and options[option] is None):
            check_not_negative(option, options[option])
    if "lr" in options:
        defaults = {**defaults, "rest_lr": None}
    known: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        if named[kind]:
            known[kind] = {**checks.hyper_parameters(base if kind == "coords" else base.fallback or base), **defaults}
            if arithmetic.default_eps is not None and "eps" not in base.options:
                known[kind]["eps"] = arithmetic.default_eps
            del known[kind]["rest_lr" if kind == "coords" else "scale"]
    for option in options:
        if not any(option in group for group in known.values()):
            all_known = sorted({"params", "rules"}.union(*known.values()))
            raise SpecError(f"unknown option '{option}' in a param group{did_you_mean(option, all_known)}", option=option)
    groups: list[Group] = []
    for kind, hyper in known.items():
        # a learning rate that is a tensor is each group's own: schedulers and users change it in place, group by group
        hyper = {key: trees.copied(options.get(key, value)) for key, value in hyper.items()}
        rest_lr = hyper.pop("rest_lr", None)
        if rest_lr is not None:
            hyper["lr"] = rest_lr
        group = {"params": named[kind], "name": prefix + kind, "kind": kind, **hyper}
        if kind == "coords":
            groups += _scaled(group | {"specs": [spec.format(sub.basis.transform) for sub in subs]}, subs, base)
        else:
            groups.append(group)
    return groups


def _scaled(group: Group, subs: list[Subspace], base: Base) -> Iterator[Group]:
    """A group of coordinates as it is, or, where ``scale="norm"``, one for each factor that its weights take.

    A base whose steps do not grow with the gradient moves each of p q coordinates as far as it would move each of m n weights:
    times (m n / p q)^(1/2) the step of W is as long as a full one. Of a base whose steps grow with it, that of the coordinates
    is the full one's projection already.

    Yields:
        The groups, with a number as their ``scale``.
    """
    if group["scale"] != "norm":
        yield group
        return
    grows = steps_grow(base)
    members: dict[float, list[int]] = {}
    for i, sub in enumerate(subs):
        ratio = math.prod(sub.weight.layout.shape) / math.prod(sub.coords.shape)
        members.setdefault(1.0 if grows else ratio**0.5, []).append(i)
    for factor, indices in members.items():
        name = group["name"] if len(members) == 1 else f"{group['name']}.{factor:.4g}"
        own = {
            key: [group[key][i] for i in indices] if key in ("params", "specs") else trees.copied(group[key]) for key in group
        }
        yield {**own, "name": name, "scale": factor}


def split_groups(groups: list[Group], decaying: Callable[[str], bool]) -> list[Group]:
    """Split param groups so that some parameters do not decay.

    Args:
        groups: The groups.
        decaying: Whether a parameter decays, by its name.

    Returns:
        The groups: what decays stays in its own; the rest goes to one of the same hyper-parameters without decay, called
        ``<name>.no_decay`` where the group is split.

    Raises:
        SpecError: It is no function.
    """
    require(
        callable(decaying),
        "decaying",
        f"decaying must be a function of a parameter's name, not {shown(decaying)}; such as "
        "opt.exclude_from_decay(lambda name: 'norm' not in name)",
    )
    found: list[Group] = []
    for group in groups:
        kept = [i for i, name in enumerate(group["param_names"]) if decaying(name)]
        others = [i for i in range(len(group["params"])) if i not in set(kept)]
        if kept:
            found.append({**group, **_part(group, kept)})
        if others:
            name = f"{group['name']}.no_decay" if kept else group["name"]
            own = {key: trees.copied(value) for key, value in group.items()}
            found.append({**own, **_part(group, others), "name": name, "weight_decay": 0.0})
    return found


def _part(group: Group, indices: list[int]) -> Group:
    by_parameter = [key for key in ("params", "param_names", "specs") if key in group]
    return {key: [group[key][i] for i in indices] for key in by_parameter}
