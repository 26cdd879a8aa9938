"""The way to train that an entry of a plan stands for, with the values that a trial tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lingrad import optimizers
from lingrad.config import spec
from lingrad.config.methods import method_of
from lingrad.config.published import METHODS
from lingrad.config.rules import parse_rules
from lingrad.config.settings import Settings
from lingrad.errors import LingradError, SpecError, require, shown
from lingrad.methods import Lingrad, Method, baseline
from lingrad.research.objects import is_object, load_object
from lingrad.research.plan import PlanEntry
from lingrad.transforms import Transform, registry


def make_method(entry: PlanEntry, values: Mapping[str, Any], *, seed: int, folder: Path) -> Method:
    """The method of an entry.

    Args:
        entry: The entry.
        values: Options that replace the entry's: those of its transform, such as ``rank``, are put into its config string, all
            others are options of the run.
        seed: Of the run.
        folder: What names of files are relative to.

    Returns:
        The method.

    Raises:
        SpecError: A name or an option is wrong.
    """
    given = {**entry.options, **values}
    if entry.baseline:
        name, own = _choice(entry.baseline, entry.name)
        return baseline(name, **{**own, **given})
    if is_object(entry.method):
        return _of_object(load_object(entry.method, folder), entry, given, seed)
    name, own = _choice(entry.method, entry.name)
    inside = _options_of(name)
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
    own = {} if is_object(text) else _choice(text, entry.name)[1]
    found = {**own, **entry.options, **values}.get("rank")
    return found if isinstance(found, int) else None


def written(name: str, options: Mapping[str, Any]) -> str:
    """A name with options, as in config strings."""
    inner = ", ".join(f"{key}={_value(value)}" for key, value in options.items())
    return f"{name}({inner})" if inner else name


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _choice(text: str, entry: str) -> tuple[str, dict[str, Any]]:
    try:
        choice = spec.parse_choice(text)
    except SpecError as error:  # such as a transform within another, which no option of a trial reaches into
        name = text.partition("(")[0].strip()
        if name in registry.transform_names():
            return text, {}
        raise SpecError(f"entry '{entry}': {error}", option="method") from None
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


def check_entry(entry: PlanEntry, folder: Path) -> None:
    """Make sure, before anything is trained, that an entry's names and options are known.

    Args:
        entry: The entry.
        folder: What names of files are relative to.

    Raises:
        SpecError: One is not; the message names the entry.
    """
    values = {
        key: axis.values[0] if axis.values else (round(axis.low) if axis.whole else axis.low)
        for key, axis in entry.space.items()
    }
    try:
        method = make_method(entry, values, seed=0, folder=folder)
    except (SpecError, TypeError) as error:
        raise SpecError(f"entry '{entry.name}': {error}", option=getattr(error, "option", None)) from error
    if isinstance(method, Lingrad):
        named = method_of(method.rules)
        options = {**({} if named is None else {**named.settings, **named.base_options}), **method.options}
        base = method.base if method.base is not None else "adamw" if named is None else named.base
        try:
            parse_rules(method.rules if named is None else named.rules)
            settings, of_base = Settings.split(options)
            optimizers.find(base, of_base, decay=settings.weight_decay != 0, others=Settings.names())
        except LingradError as error:
            raise SpecError(f"entry '{entry.name}': {error}", option=getattr(error, "option", None)) from error
