"""Pictures of memory: one run over time, or several beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingrad import plotting
from lingrad.errors import optional
from lingrad.memory.log import CATEGORIES

if TYPE_CHECKING:
    from lingrad.memory.report import MemoryReport

GIB = 2**30
SIZE = (9.0, 4.5)


def draw_timeline(report: MemoryReport, path: Path) -> Path:
    """Draw what is alive, stacked by category, over the storages made and freed.

    Args:
        report: The report.
        path: The picture to write.

    Returns:
        The path.
    """
    figure, (axes,) = plotting.figure(SIZE)
    places = [point.event for point in report.timeline]
    names = [c for c in CATEGORIES if any(point.bytes.get(c, 0) for point in report.timeline)]
    layers = [[point.bytes.get(name, 0) / GIB for point in report.timeline] for name in names]
    axes.stackplot(places, layers, labels=names, colors=[_color(name) for name in names], step="post", linewidth=0)
    axes.axhline(report.peak / GIB, color="black", linewidth=0.8, linestyle=":")
    axes.set(
        title=f"{report.source} on {report.device}: {report.peak / GIB:.2f} GiB at the peak",
        xlabel="storages made and freed",
        ylabel="GiB",
        xlim=(0, max(places[-1], 1)),
    )
    figure.legend(loc="outside right upper", fontsize=8, reverse=True)
    return plotting.save(figure, path)


def draw_comparison(reports: Mapping[str, MemoryReport], path: Path) -> Path:
    """Draw the peaks of several runs as bars, stacked by category.

    Args:
        reports: Reports by the names of their methods.
        path: The picture to write.

    Returns:
        The path.
    """
    figure, (axes,) = plotting.figure(SIZE)
    names = [c for c in CATEGORIES if any(report.breakdown.get(c, 0) for report in reports.values())]
    labels = list(reports)
    left = [0.0] * len(labels)
    for name in names:
        widths = [report.breakdown.get(name, 0) / GIB for report in reports.values()]
        axes.barh(labels, widths, left=left, label=name, color=_color(name))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    capacity = next((report.capacity for report in reports.values() if report.capacity is not None), None)
    if capacity is not None:
        axes.axvline(capacity / GIB, color="black", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel="GiB asked for at the peak")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return plotting.save(figure, path)


def _color(category: str) -> Any:
    colors = optional("matplotlib", "plotting", "plot").colormaps["tab20"].colors
    return colors[CATEGORIES.index(category) % len(colors)]
