"""Sizes in bytes as text."""

from __future__ import annotations

import re

from lingrad.errors import SpecError

CONTEXT = "512MiB"  # what a CUDA context is assumed to take, where nothing else is said; docs/memory.md has who reports what

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def readable(nbytes: int) -> str:
    """A size as text in a suitable binary unit, such as ``21.35 GiB``."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if abs(nbytes) >= _UNITS[unit]), "B")
    return f"{nbytes} B" if unit == "B" else f"{nbytes / _UNITS[unit]:.2f} {unit}"


def beside(context: int) -> str:
    """What a CUDA context takes, as the end of a sentence about what tensors take; nothing where it takes nothing."""
    return f", next to {readable(context)} for the CUDA context" if context else ""


def parse_bytes(text: str) -> int:
    """Read a size such as ``24GiB`` or ``80 GB``.

    Args:
        text: A number and a unit, binary (KiB, MiB, GiB, TiB; K, M, G, T mean the same) or decimal (kB, MB, GB, TB); or 0.

    Returns:
        Bytes.

    Raises:
        SpecError: It is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    units |= {unit[0].lower(): size for unit, size in _UNITS.items() if unit.endswith("iB")}
    if text.strip() == "0":
        return 0
    if found is None or found[2].lower() not in units:
        raise SpecError(f"'{text[:40]}' is not a size in bytes; write a number and a unit, such as 24GiB or 80GB")
    size = float(found[1]) * units[found[2].lower()]
    if size > 2**63:
        raise SpecError(f"'{text[:40]}' is more than any device has; write a number and a unit, such as 24GiB or 80GB")
    return round(size)
