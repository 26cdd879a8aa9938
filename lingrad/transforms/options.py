"""Options of a transform are checked against their annotations, whether they come from a config string or from Python."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lingrad.errors import require, require_one_of


@cache
def kinds(cls: type) -> dict[str, tuple[Any, ...]]:
    """What each option of a transform may be.

    Args:
        cls: A dataclass.

    Returns:
        Option -> the alternatives of its annotation: types, None, or a ``Literal``.
    """
    hints = get_type_hints(cls)
    return {
        option.name: get_args(hints[option.name])
        if get_origin(hints[option.name]) in (Union, UnionType)
        else (hints[option.name],)
        for option in dataclasses.fields(cls)
    }


def default(option: dataclasses.Field[Any]) -> Any:
    """An option's default value; ``dataclasses.MISSING`` where it must be given."""
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def check(config: Any) -> None:
    """Check every option of a transform against its annotation; a whole number is accepted for a float.

    Args:
        config: A dataclass instance.
    """
    cls: type = type(config)
    for option, alternatives in kinds(cls).items():
        value = getattr(config, option)
        for kind in alternatives:
            if get_origin(kind) is Literal and isinstance(value, str):
                require_one_of(value, get_args(kind), option)
        fits = any(_fits(value, kind) for kind in alternatives)
        names = " or ".join(map(_type_name, alternatives))
        require(fits, option, f"{option} must be {names}, not {format_value(value)}")
        if type(value) is int and float in alternatives and int not in alternatives:
            object.__setattr__(config, option, float(value))  # equal transforms have one config string


def format_value(value: Any) -> str:
    """A value as a config string writes it: bare words, ``true``, ``false``, ``none``, numbers, tuples."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value.isidentifier() and value not in ("true", "false", "none") else repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(format_value, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (int, bool, str):
        return type(value) is kind
    return isinstance(value, get_origin(kind) or kind)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none", str: "a word"}
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")
