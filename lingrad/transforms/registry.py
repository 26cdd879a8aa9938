"""Transforms by name: the built-in ones, those registered by decorator, and those of installed packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from lingrad.errors import SpecError, did_you_mean
from lingrad.transforms.base import Transform

GROUP = "lingrad.transforms"

_registered: dict[str, type[Transform]] = {}

T = TypeVar("T", bound=type[Transform])


def register(name: str) -> Callable[[T], T]:
    """Class decorator that makes a transform available to config strings.

    Args:
        name: The name in config strings, a Python identifier.

    Returns:
        The decorator; it returns the class unchanged but for its ``name``.

    Raises:
        SpecError: The name is taken by another class or is no word, or the class is no frozen dataclass of `Transform`.
    """
    if not (isinstance(name, str) and name.isidentifier()) or name in ("true", "false", "none"):
        raise SpecError(f"a transform is registered under a word, as in @register('mine'), not {name!r}")

    def keep(cls: T) -> T:
        if not (isinstance(cls, type) and issubclass(cls, Transform)):
            raise SpecError(f"@register('{name}') is for subclasses of lingrad.Transform, not {cls!r}")
        # a subclass without the decorator inherits the fields of its parent
        if "__dataclass_params__" not in vars(cls):
            raise SpecError(f"{cls.__name__} must be a dataclass: put @dataclass(frozen=True, kw_only=True) under @register")
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(cls.__abstractmethods__))
            raise SpecError(f"{cls.__name__} has no {missing}, which every {cls.__mro__[1].__name__} writes")
        known = _registered.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"the transform name '{name}' is taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _registered[name] = cls
        return cls

    return keep


def names() -> list[str]:
    """Names of all transforms: registered here, or offered by installed packages."""
    return sorted({*_registered, *_offered()})


def find(name: str) -> type[Transform]:
    """Look a transform up.

    Args:
        name: Its name in config strings.

    Returns:
        The class. An installed package's module is imported the first time one of its names is asked for.

    Raises:
        SpecError: No transform has this name, or what a package offers under it is not one.
    """
    if name not in _registered and name in _offered():
        cls = _offered()[name].load()
        if not (isinstance(cls, type) and issubclass(cls, Transform)):
            raise SpecError(f"the entry point '{name}' of group {GROUP} must name a Transform class, not {cls!r}")
        register(name)(cls)
    if name not in _registered:
        raise SpecError(f"unknown transform '{name}'{did_you_mean(name, names())} Known: {', '.join(names())}.")
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
