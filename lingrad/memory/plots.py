"""Plots of memory: one run over time, or several runs as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingrad import plotting
from lingrad.errors import optional
from lingrad.memory.log import CATEGORIES

GIB = 2**30
SIZE = (9.0, 4.5)  # inches


def check_format(path: Path) -> None:
    """Make sure, before anything is computed, that a picture can be written in the format that a file's suffix names.

    Args:
        path: The file. Raises ``ValueError`` if matplotlib does not know the format.
    """
    plotting.picture(plotting.figure((1.0, 1.0))[0], path.suffix)


def draw_timeline(timeline: Sequence[tuple[int, Mapping[str, int]]], path: Path, *, peak: int, title: str) -> Path:
    """Plot the memory in use, stacked by category, over the allocations and frees of a run.

    Args:
        timeline: (number of allocations and frees before, bytes by category), in order.
        path: The picture to write; its suffix decides the format.
        peak: Bytes at the peak.
        title: The title.

    Returns:
        The path.
    """
    figure, (axes,) = plotting.figure(SIZE)
    positions = [position for position, _ in timeline]
    names = [category for category in CATEGORIES if any(in_use.get(category, 0) for _, in_use in timeline)]
    layers = [[in_use.get(name, 0) / GIB for _, in_use in timeline] for name in names]
    axes.stackplot(positions, layers, labels=names, colors=[_color(name) for name in names], step="post", linewidth=0)
    axes.axhline(peak / GIB, color="black", linewidth=0.8, linestyle=":")
    axes.set(title=title, xlabel="allocations and frees", ylabel="GiB", xlim=(0, max(positions[-1], 1)))
    figure.legend(loc="outside right upper", fontsize=8, reverse=True)
    return plotting.save(figure, path)


def draw_comparison(peaks: Mapping[str, Mapping[str, int]], path: Path, *, capacity: int | None = None) -> Path:
    """Plot the peaks of several runs as bars, stacked by category.

    Args:
        peaks: Label of a run -> bytes by category at its peak.
        path: The picture to write; its suffix decides the format.
        capacity: Memory of the device in bytes, drawn as a line.

    Returns:
        The path.
    """
    figure, (axes,) = plotting.figure(SIZE)
    labels = list(peaks)
    left = [0.0] * len(labels)
    for name in (category for category in CATEGORIES if any(peak.get(category, 0) for peak in peaks.values())):
        widths = [peak.get(name, 0) / GIB for peak in peaks.values()]
        axes.barh(labels, widths, left=left, label=name, color=_color(name))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    if capacity is not None:
        axes.axvline(capacity / GIB, color="black", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel="GiB requested at the peak")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return plotting.save(figure, path)


def _color(category: str) -> Any:
    colors = optional("matplotlib", "plotting", "plot").colormaps["tab20"].colors
    return colors[CATEGORIES.index(category) % len(colors)]
