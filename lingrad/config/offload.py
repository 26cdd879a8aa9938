"""What of a run's state is in host memory between steps."""

from __future__ import annotations

from typing import Literal, get_args

from lingrad.errors import did_you_mean, require, shown

Offloaded = Literal["moments", "bases", "ledger"]

WORDS: tuple[str, ...] = get_args(Offloaded)


def parse_offload(value: object) -> frozenset[str]:
    """Read which parts of a run's state are in host memory between steps.

    Args:
        value: Words separated by commas, such as ``moments`` or ``moments, bases``; None for none.

    Returns:
        The words. Raises `SpecError` where there is another word, or none.
    """
    if value is None:
        return frozenset()
    expected = "expected moments, bases or ledger, or some of them: 'moments, bases'"
    require(isinstance(value, str), "offload", f"offload must be words, not {shown(value)}: {expected}")
    words = [word.strip() for word in str(value).split(",")]
    for word in words:
        near = did_you_mean(word, WORDS) if word else ""
        require(word in WORDS, "offload", f"offload={value!r}: '{word}' cannot be in host memory{near}; {expected}")
    return frozenset(words)


def offload_text(words: frozenset[str]) -> str | None:
    """The words in one order, as `parse_offload` reads them; None where there are none."""
    return ", ".join(word for word in WORDS if word in words) or None
