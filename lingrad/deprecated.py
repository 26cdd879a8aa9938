"""Names and command lines of the version before. They keep working for one version, with a warning, and then this file goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from lingrad.errors import SpecError, warn_caller

P = ParamSpec("P")
R = TypeVar("R")

# --- names in Python ---

_MODULES = {"bases": "lingrad.optimizers", "lowbit": "lingrad.memory"}  # attributes of the package, and what they are now
_CLASSES = ("GradientBasis", "SketchBasis")
_PATHS = {  # for ``from OLD import name``: where the names are, and what to write instead
    "lingrad.bases": ("lingrad.optimizers", "lingrad.optimizers"),
    "lingrad.explain": ("lingrad.config.explain", "from lingrad import explain"),
    "lingrad.lowbit": ("lingrad.memory", "from lingrad.memory import moments"),
}


def top_level(name: str) -> Any:
    """What ``lingrad.NAME`` was.

    Args:
        name: A name that the package does not have.

    Returns:
        What it has been replaced by, with a warning.

    Raises:
        AttributeError: The version before did not have it either.
    """
    if name in _MODULES:
        _warn(f"lingrad.{name} is deprecated; use {_MODULES[name]}")
        return import_module(_MODULES[name])
    if name in _CLASSES:
        _warn(f"lingrad.{name} is deprecated; use lingrad.SideTransform")
        return old_base(name)
    raise AttributeError(f"module 'lingrad' has no attribute '{name}'")


def alias_modules() -> None:
    """Have ``from OLD import name`` find modules that moved; a warning comes with the first name that is taken of one."""
    for old, (module, instead) in _PATHS.items():
        if old not in sys.modules:
            sys.modules[old] = _Moved(old, module, instead)


class _Moved(ModuleType):
    def __init__(self, old: str, module: str, instead: str) -> None:
        super().__init__(old)
        self.__path__: list[str] = []
        self._module, self._instead = module, instead

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _warn(f"{self.__name__} is deprecated; use {self._instead}")
        return getattr(import_module(self._module), name)


@cache
def old_base(name: str) -> Any:
    """A base class of transforms as it was: one method for both sides, or two for a sketch.

    Args:
        name: ``GradientBasis``, whose subclasses write ``bases``, or ``SketchBasis``, whose subclasses write ``probes`` and
            ``learn``.

    Returns:
        The class, derived from `lingrad.SideTransform`.
    """
    side = import_module("lingrad.transforms").SideTransform

    def basis(self: Any, seen: Any, old: Any, when: Any) -> Any:
        raise SpecError(f"{type(self).__name__} writes no basis method; derive it from lingrad.SideTransform and write one")

    body = {"basis": basis, "__module__": __name__, "__doc__": f"`lingrad.SideTransform` in place of {name}."}
    return type(name, (side,), body | ({"reads": "sketch"} if name == "SketchBasis" else {}))


def renamed_attributes(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module some of whose public names have changed.

    Args:
        module: The module's dotted name.
        names: Old name -> new name: of this module, or with the module that has it. A class of `old_base` is given as it was.

    Returns:
        A function of the missing name. It warns about an old name, and raises ``AttributeError`` for any other.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        if name in _CLASSES:
            return top_level(name)
        home, _, new = names[name].rpartition(".")
        _warn(f"{module}.{name} is deprecated; use {home or module}.{new}")
        return getattr(import_module(home or module), new)

    return find


def renamed_option(options: dict[str, Any], old: str, new: str, where: str) -> None:
    """Take an option by its old name.

    Args:
        options: Keyword arguments, changed in place.
        old: The old name.
        new: The new name.
        where: Whose option it is, for messages.

    Raises:
        SpecError: Both are given.
    """
    if old not in options:
        return
    if new in options:
        raise SpecError(f"{where} got {old}, which is now called {new}, and {new}; leave {old} out", option=old)
    _warn(f"{old} of {where} is deprecated; use {new}")
    options[new] = options.pop(old)


def renamed_keywords(where: str, /, **names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for a function some of whose arguments have changed their names.

    Args:
        where: The function's public name, for messages.
        **names: Old name=new name.

    Returns:
        The decorator; the function then takes the old names too, each with a warning, and raises `SpecError` for both at once.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def taking(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                given = {**signature(function).bind_partial(*args).arguments, **kwargs}
                renamed_option(given, old, names[old], where)
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return taking

    return decorate


def _warn(message: str) -> None:
    warn_caller(message, DeprecationWarning)


# --- the command line ---

_OPTIONS = {
    "memory": {"--spec": "--rules", "--seq": "--length"},
    "train": {"--spec": "--rules"},
    "convert": {"--decayed-base": "--decayed-start"},
}
_MEMORY = ("simulate", "fit", "compare", "estimate")
_SHARED = ("-h", "--help", "-q", "--quiet", "--import")  # options that may come before them today
_MODES = {"--compare": "compare", "--max-batch": "fit", "--closed-form": "estimate"}
# accepted before, without effect
_IGNORED = {"compare": ("--mode",), "fit": ("--batch",), "estimate": ("--checkpointing", "--stagger", "--expandable")}
# options of convert that take a value
_VALUED = (
    "--out",
    "--rank",
    "--energy",
    "--max-error",
    "--dtype",
    "--decayed-start",
    "--allow-residual",
    "--target",
    "--base-model",
    "--json",
)


def command_line(given: Sequence[str]) -> list[str]:
    """Translate an old command line to the present one; each old spelling is named on standard error.

    Args:
        given: The arguments after the program's name.

    Returns:
        The arguments to parse. Those of today's spelling are returned as they are.
    """
    words = list(given)
    if not words:
        return words
    words = [_renamed_option(words[0], word) for word in words]
    if words[0] == "memory" and len(words) > 1 and words[1] not in (*_MEMORY, *_SHARED):
        return ["memory", *_memory(words[1:])]
    if words[0] == "convert" and "--exact" in words:
        return ["export", *_export(words[1:])]
    return words


def _say(old: str, new: str) -> None:
    sys.stderr.write(f"deprecated: {old}; use {new}\n")


def _renamed_option(command: str, word: str) -> str:
    name, equals, value = word.partition("=")
    new = _OPTIONS.get(command, {}).get(name)
    if new is None:
        return word
    _say(f"lingrad {command} {name}", new)
    return f"{new}{equals}{value}"


def _memory(words: list[str]) -> list[str]:
    """``lingrad memory`` had one command for what are four."""
    chosen = [word for word in words if word in _MODES]
    if len(chosen) > 1:
        raise SpecError(f"{' and '.join(chosen)} are different commands; run one at a time")
    command = _MODES[chosen[0]] if chosen else "simulate"
    _say(f"lingrad memory{f' {chosen[0]}' if chosen else ' without a command'}", f"lingrad memory {command}")
    kept: list[str] = []
    skip = False
    for word in words:
        name, equals, _ = word.partition("=")
        if not skip and word not in _MODES and name not in _IGNORED.get(command, ()):
            kept.append(word)
        skip = name in ("--mode", "--batch") and name in _IGNORED.get(command, ()) and not equals
    return [command, *kept]


def _export(words: list[str]) -> list[str]:
    """``lingrad convert [START] RUN --exact`` is ``lingrad export RUN [--start START]``."""
    _say("lingrad convert --exact", "lingrad export RUN --start START")
    folders: list[str] = []
    options: list[str] = []
    valued = False
    for word in words:
        if valued or word.startswith("--"):
            options.append(word)
        else:
            folders.append(word)
        valued = not valued and word in _VALUED
    if len(folders) == 2:
        start, run = folders
        folders = [run, "--start", start]
    return [*folders, *(word for word in options if word != "--exact")]
