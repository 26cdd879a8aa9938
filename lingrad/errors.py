"""Every error lingrad raises on purpose, and the one helper that suggests a nearby name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LingradError(Exception):
    """Base of all errors raised by lingrad."""


class SpecError(LingradError, ValueError):
    """A config string, a rule or an option is wrong.

    Args:
        message: What was wrong, what was expected and what to do.
        option: The option the message is about, so that a parser can point at it.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class ShapeError(LingradError, ValueError):
    """A rank, a side or a tensor does not fit the shape of a weight."""


class DualityError(LingradError, ValueError):
    """What was asked for has no exact twin in the other mode; the message names the cause and the remedy."""


class ModeError(LingradError, RuntimeError):
    """An operation was asked for in a mode, or on a model, that cannot serve it."""


class CheckpointError(LingradError, ValueError):
    """A saved state does not belong to this run; the message names the first difference."""


class DataError(LingradError, ValueError):
    """A text, a model folder or a results folder cannot be used."""


class DependencyError(LingradError, ImportError):
    """An optional package is missing.

    Args:
        what: What was asked for.
        package: The package it needs.
        extra: The extra of lingrad that brings the package.
    """

    def __init__(self, what: str, package: str, extra: str | None) -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'lingrad[{extra}]'")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Phrase a suggestion for a misspelt name.

    Args:
        word: The name as it was written.
        names: The names that would have been valid.

    Returns:
        ``"; did you mean 'x'?"``, or an empty string when nothing is near.
    """
    near = get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
