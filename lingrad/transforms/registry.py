"""Transforms by name: the built-in ones, those registered by decorator, and those of installed packages."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from typing_extensions import dataclass_transform

from lingrad.errors import SpecError, did_you_mean
from lingrad.transforms.base import Transform

GROUP = "lingrad.transforms"

_registered: dict[str, type[Transform]] = {}

T = TypeVar("T", bound=type[Transform])


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, dataclasses.Field))
def register(name: str) -> Callable[[T], T]:
    """Class decorator that makes a transform available to config strings.

    Args:
        name: The name in config strings, a Python identifier.

    Returns:
        The decorator. It sets the ``name`` of the class, makes it a frozen dataclass with keyword-only options if it is not a
        dataclass yet, and returns it.

    Raises:
        SpecError: The name is not an identifier or is taken by another class; or the class is not a subclass of `Transform`,
            lacks a method, or has an option with the name of a method.
    """
    if not (isinstance(name, str) and name.isidentifier()) or name in ("true", "false", "none", "frozen"):
        raise SpecError(f"a transform is registered under a word, as in @register('mine'), not {name!r}")

    def add(cls: T) -> T:
        if not (isinstance(cls, type) and issubclass(cls, Transform)):
            raise SpecError(f"@register('{name}') is for subclasses of lingrad.Transform, not {cls!r}")
        if inspect.isabstract(cls):
            missing = " and ".join(sorted(cls.__abstractmethods__))
            raise SpecError(f"{cls.__name__} does not define {missing}, which every {cls.__mro__[1].__name__} must")
        if "__dataclass_params__" not in vars(cls):  # a parent's are inherited
            dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        _require_free_names(cls)
        known = _registered.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"the transform name '{name}' is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _registered[name] = cls
        return cls

    return add


def _require_free_names(cls: type[Transform]) -> None:
    """Make sure that no option hides a method or a property, such as ``reads``, of a parent."""
    for option in dataclasses.fields(cls):
        for parent in cls.__mro__[1:]:
            hidden = vars(parent).get(option.name)
            if inspect.isfunction(hidden) or isinstance(hidden, property):
                raise SpecError(
                    f"{cls.__name__}.{option.name} has an annotation, which makes it an option of config strings, but it is a "
                    f"{'property' if isinstance(hidden, property) else 'method'} of every {parent.__name__}; leave out the "
                    "annotation to set it for the class, or rename the option"
                )


def transform_names() -> list[str]:
    """Names of all transforms: those registered, and those that installed packages offer."""
    return sorted({*_registered, *_offered()})


def find_transform(name: str) -> type[Transform]:
    """Find a transform by name.

    Args:
        name: Its name in config strings.

    Returns:
        The class. An installed package's module is imported the first time one of its names is looked up.

    Raises:
        SpecError: No transform has this name, or what a package offers under it is not a transform.
    """
    if name not in _registered and name in _offered():
        cls = _offered()[name].load()
        if not (isinstance(cls, type) and issubclass(cls, Transform)):
            raise SpecError(f"the entry point '{name}' of group {GROUP} must name a Transform class, not {cls!r}")
        register(name)(cls)
    if name not in _registered:
        own = "one of your own once its module is imported, or by an entry point (CONTRIBUTING.md)"
        known = f"Known: {', '.join(transform_names())}; {own}."
        raise SpecError(f"unknown transform '{name}'{did_you_mean(name, transform_names())} {known}")
    return _registered[name]


def _offered() -> dict[str, EntryPoint]:
    offered: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        known = _registered.get(point.name)
        holder = f"{known.__module__}:{known.__qualname__}" if known is not None else offered.get(point.name, point).value
        if holder != point.value:
            raise SpecError(
                f"the transform name '{point.name}' is offered by {point.value} and by {holder}; remove one of them"
            )
        offered[point.name] = point
    return offered
