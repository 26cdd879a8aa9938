r"""Regular expressions in a foreign adapter's config, matched as PEFT does, in a time that is known before.

Python's engine tries every way to match: a pattern of 20 characters can take years. What is accepted is what is written for
names of modules: names, ``.*``, ``\d+``, ``[0-9]+``, groups of alternatives, a few of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 2**20  # characters of all patterns of one option: names of all layers of the largest models
_REPEATS = 3  # in one alternative: the time grows with the length of a name to this power
_BRANCHES = 1024  # ways through the groups of one alternative
_MOST = 64  # patterns of one option that are no plain names
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\{\d*,?\d*\}|.", re.DOTALL)
_PLAIN = re.compile(r"[\w.-]*")
_QUANTIFIERS = ("*", "+", "?", "{")


def is_bounded(pattern: str) -> bool:
    """Whether a text is a regular expression that is matched against a name in a short time.

    Args:
        pattern: The text.

    Returns:
        Whether it is.
    """
    if _PLAIN.fullmatch(pattern):
        return True
    if len(pattern) > LONGEST or not all(map(_is_bounded, _alternatives(pattern))):
        return False
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError, MemoryError):
        return False
    return True


def _alternatives(pattern: str) -> list[list[str]]:
    """The pieces of each alternative outside groups."""
    found: list[list[str]] = [[]]
    depth = 0
    for piece in _TOKEN.findall(pattern):
        depth += piece.startswith("(") - (piece == ")")
        if piece == "|" and depth <= 0:
            found.append([])
        else:
            found[-1].append(piece)
    return found


def _is_bounded(pieces: list[str]) -> bool:
    repeats, branches = 0, 1
    inside: list[int] = []  # alternatives of each open group
    for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
        if piece in ("(", "(?:"):
            inside.append(1)
            if piece == "(" and following == "?":  # lookaround, flags, names
                return False
        elif piece == ")" and inside:
            branches *= inside.pop()
            if following.startswith(_QUANTIFIERS) and following != "?":
                return False  # a repeated group: what is in it could match in many ways
        elif piece == "|" and inside:
            inside[-1] += 1
        elif piece.startswith(_QUANTIFIERS):
            repeats += piece != "?"
            branches *= 2 if piece == "?" else 1
        elif piece[0] == "\\" and piece[1:].isdigit():  # what a group has matched
            return False
        if repeats > _REPEATS or branches > _BRANCHES:
            return False
    return True


def are_bounded(patterns: Mapping[str, Any]) -> bool:
    """Whether all patterns of an option are bounded, and so is their number.

    Args:
        patterns: The option; its keys are the patterns.

    Returns:
        Whether they are.
    """
    complex_ = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
    return sum(map(len, patterns)) <= LONGEST * 8 and len(complex_) <= _MOST and all(map(is_bounded, complex_))


def values(patterns: Mapping[str, Any], default: Any) -> Callable[[str], Any]:
    """What ``rank_pattern`` or ``alpha_pattern`` says.

    Args:
        patterns: Regular expressions of the ends of names -> rank or alpha; the first that matches holds.
        default: What holds where none matches.

    Returns:
        A function of a module's or parameter's name.
    """
    # names are looked up, by their length and the places of their dots, which match any character
    plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
    compiled = []
    for i, pattern in enumerate(patterns):
        if _PLAIN.fullmatch(pattern):
            dots = tuple(place for place, char in enumerate(pattern) if char == ".")
            plain.setdefault((len(pattern), dots), {})[pattern] = i
        else:
            compiled.append((i, re.compile(rf"(.*\.)?({pattern})$")))
    every = list(patterns.values())

    def value(name: str) -> Any:
        ends = {len(end): end for end in (name[i:] for i in range(len(name) + 1) if i == 0 or name[i - 1] == ".")}
        first = next((i for i, pattern in compiled if pattern.match(name)), len(every))
        for (length, dots), known in plain.items():
            end = ends.get(length)
            if end is not None:
                masked = "".join("." if place in dots else char for place, char in enumerate(end))
                first = min(first, known.get(masked, first))
        return every[first] if first < len(every) else default

    return value
