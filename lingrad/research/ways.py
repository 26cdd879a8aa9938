"""The way to train that an entry of a plan stands for, with the values that a trial tries."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingrad.config import spec
from lingrad.config.methods import long_rules, method_of
from lingrad.config.published import METHODS
from lingrad.config.rules import parse_rules
from lingrad.config.settings import Settings
from lingrad.errors import DependencyError, LingradError, ShapeError, SpecError, in_short, require, shown
from lingrad.methods import BASELINES, Lingrad, Method, baseline
from lingrad.research.objects import is_object, load_object
from lingrad.research.plan import PlanEntry
from lingrad.transforms import Transform, registry
from lingrad.transforms.options import format_value

SMALL = 64  # the side of the layers that values are tried on


def make_method(entry: PlanEntry, values: Mapping[str, Any], *, seed: int, folder: Path) -> Method:
    """The method of an entry.

    Args:
        entry: The entry.
        values: Options that replace the entry's: those of its transform, such as ``rank``, are put into its config string, all
            others are options of the run. ``lr`` is the run's, whatever else has one.
        seed: Of the run.
        folder: What names of files are relative to.

    Returns:
        The method.

    Raises:
        SpecError: A name or an option is wrong.
    """
    given = {**entry.options, **values}
    if entry.baseline:
        name, own = _choice(entry.baseline)
        drawn = {"seed": seed} if "seed" in getattr(BASELINES.get(name), "options", {}) else {}
        return baseline(name, **{**drawn, **own, **given})
    if is_object(entry.method):
        return _of_object(load_object(entry.method, folder), entry, given, seed)
    name, own = _choice(entry.method)
    inside = _options_of(name) - {"lr"}  # a transform's own, pca's, stands in the config string alone
    text = written(name, {**own, **{key: value for key, value in given.items() if key in inside}})
    options = {key: value for key, value in given.items() if key not in inside}
    base = options.pop("base", None)
    method_of(text)  # raises where the name or an option of it is wrong
    return Lingrad(text, base, entry.mode, {"seed": seed, **options})


def _of_object(found: Any, entry: PlanEntry, given: dict[str, Any], seed: int) -> Method:
    """The method of a user's own object: a method, rules, or a function of the values that returns either."""
    if callable(found) and not isinstance(found, Method | Transform):
        found, given = found(**given), {}
    if isinstance(found, Method):
        require(not given, "options", f"entry '{entry.name}': {entry.method} is a whole method, which takes no options")
        return found
    if not isinstance(found, Transform | Mapping | str):
        raise SpecError(
            f"entry '{entry.name}': {entry.method} is no method (lingrad.methods.Method), transform or rules, nor a function "
            f"that returns one, but {shown(found)}",
            option="method",
        )
    return Lingrad(found, given.pop("base", None), entry.mode, {"seed": seed, **given})


def rank_of(entry: PlanEntry, values: Mapping[str, Any]) -> int | None:
    """The rank of an entry; None where it has none."""
    text = entry.baseline or entry.method
    name, own = ("", {}) if is_object(text) else _choice(text)
    defaults = METHODS[name].options if name in METHODS and not entry.baseline else {}
    found = {**defaults, **own, **entry.options, **values}.get("rank")
    return found if isinstance(found, int) else None


def written(name: str, options: Mapping[str, Any]) -> str:
    """A name with options, as in config strings."""
    inner = ", ".join(f"{key}={value if isinstance(value, str) else format_value(value)}" for key, value in options.items())
    return f"{name}({inner})" if inner else name


def _choice(text: str) -> tuple[str, dict[str, Any]]:
    try:
        choice = spec.parse_choice(text)
    except SpecError as error:  # such as a transform within another, which no option of a trial reaches into
        name = text.partition("(")[0].strip()
        if name in registry.transform_names():
            return text, {}
        raise SpecError(str(error), option="method") from None
    return choice.name.lower().replace("-", "_"), dict(choice.options)


def _options_of(name: str) -> set[str]:
    """The options that are written in brackets behind a name."""
    if name in METHODS:
        sample: Any = spec.parse(METHODS[name].spec.format(**{key: value or 1 for key, value in METHODS[name].options.items()}))
        inner = getattr(sample, "each", sample)
        return {*METHODS[name].options, *(option.name for option in fields(inner))}
    if name in registry.transform_names():
        return {option.name for option in fields(registry.find_transform(name))}
    return set()


def check_entry(entry: PlanEntry, folder: Path, dtype: str = "float32") -> None:
    """Try every listed value of an entry on three small layers before anything is trained.

    Args:
        entry: The entry.
        folder: What names of files are relative to.
        dtype: Of the weights.

    Raises:
        SpecError: A name, an option or a value is wrong, or two of them exclude each other; the message names the entry.
        DependencyError: It needs a package that is not installed.
    """
    firsts = {key: axis.values[0] if axis.values else axis.lowest for key, axis in entry.space.items()}
    others = [{**firsts, key: value} for key, axis in entry.space.items() for value in axis.values[1:]]
    for values in (firsts, *others):
        try:
            method = make_method(entry, values, seed=0, folder=folder)
            if isinstance(method, Lingrad):
                parsed = parse_rules(long_rules(method.rules))
                if not isinstance(parsed, Transform):  # globs that name the modules of the task's own model
                    Settings.split(method.options)
                    continue
            layers = [nn.Linear(SMALL, SMALL) for _ in range(3)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                method.prepare(nn.Sequential(*layers).to(getattr(torch, dtype))).close()
        except (ShapeError, NotImplementedError):  # of three layers of this shape; the task's may do
            continue
        except DependencyError as error:
            raise DependencyError(f"entry '{entry.name}': {error}") from error
        except LingradError as error:
            raise SpecError(f"entry '{entry.name}': {error}", option=getattr(error, "option", None)) from error
        except (TypeError, ValueError, RuntimeError) as error:  # of other packages
            tried = ", ".join(f"{key}={value!r}" for key, value in {**entry.options, **values}.items())
            raise SpecError(f"entry '{entry.name}' with {tried}: {in_short(error)}") from error
