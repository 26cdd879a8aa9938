"""The errors that lingrad raises, and helpers for their messages."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import currentframe
from os import sep
from pathlib import Path
from reprlib import Repr
from typing import Any

_INSIDE = (
    f"{Path(__file__).parent}{sep}",
    "<frozen importlib",
    contextlib.__file__,
)  # how names of files begin that no warning is of
_SHORT = 300  # characters of a message of another program


class LingradError(Exception):
    """Base of all errors raised by lingrad."""


class SpecError(LingradError, ValueError):
    """A config string, a rule or an option is wrong.

    Args:
        message: What was wrong, what was expected and what to do.
        option: The option that the message is about, so that a parser can point at it.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class ShapeError(LingradError, ValueError):
    """A rank, a side or a tensor does not fit the shape of a weight."""


class DualityError(LingradError, ValueError):
    """The request has no exact counterpart in the other mode; the message names the cause and the remedy."""


class ModeError(LingradError, RuntimeError):
    """An operation is not supported in this mode, at this point of a run, or for this model."""


class CheckpointError(LingradError, ValueError):
    """A saved state does not belong to this run; the message names the first difference."""


class ExchangeError(LingradError, RuntimeError):
    """Workers of a decentralised run cannot merge what they send each other."""


class DataError(LingradError, ValueError):
    """A text, a model folder or a results folder cannot be used."""


class ExportError(LingradError, ValueError):
    """A trained change cannot be written in the requested form, or that form does not reproduce it; nothing was written."""


class MemoryModelError(LingradError, RuntimeError):
    """The memory of a run cannot be determined without a real device, or cannot be measured on this one."""


class DependencyError(LingradError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class _Short(Repr):
    """`repr` in a few words: foreign values may be huge, or lists that hold each other twice, 2^30 words in 3 kB."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 2, 4, 4, 4, 4
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_int(self, x: int, level: int) -> str:  # reprlib's own fails where a number has too many digits
        return repr(x) if abs(x) < 10**40 else f"a whole number of about {x.bit_length() * 0.30103:.0f} digits"

    def repr_instance(self, x: Any, level: int) -> str:
        return super().repr_instance(x, level) if type(x).__module__ == "builtins" else f"a {type(x).__name__}"


def shown(value: object) -> str:
    """A value of a foreign file for a message, short whatever it is.

    Args:
        value: The value.

    Returns:
        Its ``repr``, cut.
    """
    return _Short().repr(value)


def in_short(error: Exception) -> str:
    """An error of another program in one line; some print whole models.

    Args:
        error: The error.

    Returns:
        Its class and its message, cut.
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= _SHORT else f'{text[:_SHORT]} ...'}"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """End a sentence about a misspelt name.

    Args:
        word: The name as it was written.
        names: The names that would have been valid.

    Returns:
        ``"; did you mean 'x'?"``, or a full stop if no name is close.
    """
    by_lower = {name.lower(): name for name in names}
    near = get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else "."


def require(condition: bool, option: str, message: str) -> None:
    """Raise a `SpecError` about an option unless a condition holds.

    Args:
        condition: What must be true.
        option: The option's name, for the caret.
        message: What was wrong and what was expected.

    Raises:
        SpecError: The condition is false.
    """
    if not condition:
        raise SpecError(message, option=option)


def require_one_of(value: object, allowed: Sequence[object], option: str) -> None:
    """Raise a `SpecError` about an option unless its value is one of those allowed.

    Args:
        value: The value given.
        allowed: The values that are valid.
        option: The option's name, for the caret.
    """
    words = [str(word) for word in allowed]
    near = did_you_mean(str(value), words)
    require(value in allowed, option, f"{option} must be one of {', '.join(words)}, not {value!r}{near}")


def require_options(options: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise a `SpecError` about the first option that something does not have.

    Args:
        options: The names of the options given.
        known: Those that it has.
        what: What it is, to begin a sentence.
    """
    for option in options:
        near = did_you_mean(option, known)
        require(option in known, option, f"{what} has no option '{option}'{near} It takes: {', '.join(known)}.")


def optional(module: str, what: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Its dotted name.
        what: What needs it, to begin a sentence.
        extra: The extra of lingrad that brings the package.

    Returns:
        The module.

    Raises:
        DependencyError: The package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DependencyError(f"{what} needs the package {package}: pip install 'lingrad[{extra}]'") from error


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line outside the package that led here, however many calls of the package are between.

    Args:
        message: What is to be said.
        category: The kind of warning.
    """
    frame = currentframe()
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    assert frame is not None  # noqa: S101 - Python has frames
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__", "<unknown>"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
