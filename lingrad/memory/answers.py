"""What `lingrad memory fit` and `compare` find."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lingrad.console import columns
from lingrad.memory.plots import draw_comparison
from lingrad.memory.report import WORDS, MemoryReport
from lingrad.memory.units import beside, parse_bytes, readable


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest batch that fits.

    Args:
        method: The label of the method.
        capacity: The device's memory.
        context: What the CUDA context takes of it.
        length: Tokens of a row.
        rows: Rows of the largest batch that fits; 0 if not even one row does.
        reserved: Bytes that the allocator takes for that batch, or for one row if none fits.
        at_least: Whether no larger batch was tried.
    """

    method: str
    capacity: str
    context: str
    length: int
    rows: int
    reserved: int
    at_least: bool = False

    def __str__(self) -> str:
        takes = f"{readable(self.reserved)} reserved" + beside(parse_bytes(self.context))
        if self.rows == 0:
            return f"not even one row of {self.length} tokens fits in {self.capacity}: it takes {takes}"
        rows = f"{'at least ' if self.at_least else ''}{self.rows} rows"
        return f"{rows} of {self.length} tokens fit in {self.capacity} ({self.method}): they take {takes}"

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class MethodComparison:
    """Several methods under the same conditions.

    Args:
        reports: Label of a method -> its report.
        left_out: Label of a method -> why it could not be simulated.
    """

    reports: Mapping[str, MemoryReport]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("", "peak", "between steps", "reserved", "verdict")]
        for label, report in self.reports.items():
            verdict = "" if report.fits is None else "fits" if report.fits else "does NOT fit"
            reserved = "-" if report.reserved is None else readable(report.reserved)
            rows.append((label, readable(report.peak), readable(report.steady), reserved, verdict))
        lines = columns(rows, right=[False, True, True, True, False])
        return "\n".join([*lines, "", WORDS, *(f"left out: {label} ({why})" for label, why in self.left_out.items())])

    def to_json(self) -> str:
        """All reports as JSON."""
        plain = {"reports": {k: r.to_dict() for k, r in self.reports.items()}, "left_out": dict(self.left_out)}
        return json.dumps(plain, indent=1)

    def plot(self, path: Path) -> Path:
        """Plot the peaks as bars, stacked by category.

        Args:
            path: The picture to write; its suffix decides the format.

        Returns:
            The path.
        """
        capacity = next((report.capacity for report in self.reports.values()), None)
        return draw_comparison({label: report.breakdown for label, report in self.reports.items()}, path, capacity=capacity)
