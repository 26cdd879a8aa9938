"""Names and command lines of the version before. They keep working for one version, with a warning, and then this file goes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lingrad.errors import SpecError


def renamed_attributes(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module some of whose public names have changed.

    Args:
        module: The module's dotted name.
        names: Old name -> new name, both of this module.

    Returns:
        A function of the missing name. It warns about an old name, and raises ``AttributeError`` for any other.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        warnings.warn(f"{module}.{name} is deprecated; use {module}.{names[name]}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

    return find


# --- the command line ---

_OPTIONS = {"memory": {"--spec": "--rules", "--seq": "--length"}, "train": {"--spec": "--rules"}}
_MEMORY = ("simulate", "fit", "compare", "estimate")
_MODES = {"--compare": "compare", "--max-batch": "fit", "--closed-form": "estimate"}
# accepted before, without effect
_IGNORED = {"compare": ("--mode",), "fit": ("--batch",), "estimate": ("--checkpointing", "--stagger", "--expandable")}
# options of convert that take a value
_VALUED = ("--out", "--rank", "--energy", "--max-error", "--dtype", "--decayed-base", "--json")


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
    if words[0] == "memory" and len(words) > 1 and words[1] not in (*_MEMORY, "--help"):
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
    """``lingrad convert [BASE] RUN --exact`` is ``lingrad export RUN [--start BASE]``."""
    _say("lingrad convert --exact", "lingrad export RUN --start BASE")
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
        base, run = folders
        folders = [run, "--start", base]
    return [*folders, *(word for word in options if word != "--exact")]
