"""The pictures of a report, as PNG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from lingrad import plotting
from lingrad.research.plan import ResearchPlan
from lingrad.research.results import Summary, diagnosed, measure

COLORS = "blue orange green red purple brown pink gray olive cyan"
WIDE = 4.5  # inches of one of several axes
FEW = 30  # points of a line, up to which they have marks
DECADES = 100.0  # the ratio of values from which an axis is logarithmic


def curves(found: Sequence[Summary]) -> bytes:
    """The training losses of the final runs, averaged over seeds, as PNG."""
    figure, axes = _axes()
    for one in found:
        good = [run for run in one.finals if not run.failed]
        if good:
            steps = [step for step, _ in good[0].curve]
            losses = [sum(run.curve[i][1] for run in good) / len(good) for i in range(min(len(run.curve) for run in good))]
            axes.plot(steps[: len(losses)], losses, marker="", label=one.entry.name)
    axes.set(xlabel="step", ylabel="training loss")
    _legend(axes)
    return plotting.picture(figure)


def sensitivity(plan: ResearchPlan, found: Sequence[Summary]) -> bytes:
    """The metric of each trial over its learning rate, as PNG; nothing where it was not searched."""
    if not any("lr" in one.entry.space for one in found):
        return b""
    figure, axes = _axes()
    for one in found:
        points = sorted(
            (run.values["lr"], run.info["metrics"][plan.task.metric])
            for run in one.trials
            if not run.failed and "lr" in run.values
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{one.entry.name}{' (best at the edge)' * ('lr' in one.at_edge)}")
    axes.set(xlabel="learning rate", ylabel=f"{plan.task.metric} of a trial", xscale="log")
    _legend(axes)
    return plotting.picture(figure)


def pareto(found: Sequence[Summary], x: str, y: str) -> bytes:
    """Two measures of the final runs, with standard errors, as PNG."""
    figure, axes = _axes()
    for one in found:
        across, up = measure(one, x), measure(one, y)
        if across.count and up.count:
            axes.errorbar(
                across.value,
                up.value,
                yerr=0.0 if math.isnan(up.error) else up.error,
                capsize=3,
                label=one.entry.name,
            )
    axes.set(xlabel=x, ylabel=y)
    _legend(axes)
    return plotting.picture(figure)


def diagnostics(found: Sequence[Summary]) -> bytes:
    """What the diagnostics of the final runs have measured over their steps, a mean over seeds; nothing where there is none.

    Args:
        found: The entries.

    Returns:
        PNG, with axes for each name; where values differ a hundredfold and none is below 0 they are logarithmic.
    """
    names = diagnosed(found)
    if not names:
        return b""
    figure, every = plotting.figure((max(10.0, WIDE * len(names)), 5), len(names))
    labels: dict[str, Any] = {}
    for axes, name in zip(every, names, strict=True):
        _cycle(axes)
        drawn: list[Any] = []
        for one in found:
            series = [run.measured[name] for run in one.finals if not run.failed and name in run.measured]
            at: dict[int, list[float]] = {}
            for step, value in itertools.chain(*series):
                at.setdefault(step, []).append(value)
            means = [sum(at[step]) / len(at[step]) for step in sorted(at)]
            # an entry has one line and color in all axes, also where another has none
            lines = axes.plot(sorted(at), means, marker="" if len(at) > FEW else None, markersize=4, label=one.entry.name)
            if at:
                labels[one.entry.name] = lines[0]
            drawn += lines
        above = [value for line in drawn for value in line.get_ydata() if value > 0]
        if above and max(above) > DECADES * min(above) and not any(value < 0 for line in drawn for value in line.get_ydata()):
            for line in drawn:  # a logarithmic axis has no zero
                line.set_ydata([value or math.nan for value in line.get_ydata()])
            axes.set_yscale("log")
        axes.set(xlabel="step", title=name)
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return plotting.picture(figure)


def _axes() -> tuple[Any, Any]:
    figure, (axes,) = plotting.figure((10, 5))
    _cycle(axes)
    return figure, axes


def _cycle(axes: Any) -> None:
    """Have thirty entries differ, by color, line and marker."""
    kinds = [(line, marker) for line, marker in (("-", "o"), ("--", "s"), (":", "^")) for _ in range(10)]
    lines, markers = zip(*kinds, strict=True)
    axes.set_prop_cycle(color=[f"tab:{name}" for name in COLORS.split()] * 3, linestyle=lines, marker=markers)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside right upper", fontsize=8)
