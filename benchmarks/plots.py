"""Pictures of results: steps beside full AdamW, refreshes by time and energy, and curves."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import ratio
from benchmarks.plan import FULL, PERIOD
from lingrad import plotting


def draw(found: dict[str, Any], folder: Path) -> None:
    """Draw what a run measured.

    Args:
        found: The results.
        folder: Where the pictures go; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, timings in found["steps"].items():
        _steps(name, timings, folder / f"steps-{name}.png")
    if found["refreshes"]:
        _refreshes(found["refreshes"], folder / "refreshes.png")
    if found["curves"]:
        _curves(found["curves"], folder / "curves.png")


def place(what: str, workload: dict[str, Any]) -> int:
    """Where a workload stands on the axis of a curve."""
    if what in ("rank", "tokens"):
        return int(workload[what])
    return int(workload["model"][what])


def _against_full(timing: dict[str, Any], full: dict[str, Any]) -> Any:
    these, those = ([t + one["extra"] / PERIOD for t in one["seconds"]] for one in (timing, full))
    return ratio(these, those)


def _steps(name: str, timings: list[dict[str, Any]], path: Path) -> None:
    full = next(timing for timing in timings if timing["key"] == FULL)
    ratios = [_against_full(timing, full) for timing in timings]
    figure, axes = _figure(1, height=0.32 * len(timings) + 1.2)
    places = range(len(timings))
    errors = [[r.middle - r.low for r in ratios], [r.high - r.middle for r in ratios]]
    mine = [timing["key"].startswith(("optimizer", "adapter")) for timing in timings]
    axes[0].barh(places, [r.middle for r in ratios], xerr=errors, color=["C0" if ours else "0.7" for ours in mine], capsize=2)
    axes[0].set_yticks(places, [timing["key"] for timing in timings], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes[0].set(xlabel=f"time of a step / full AdamW, refresh spread over {PERIOD} steps; median and quartiles", title=name)
    plotting.save(figure, path)


def _refreshes(records: list[dict[str, Any]], path: Path) -> None:
    figure, axes = _figure(1)
    texts = list(dict.fromkeys(record["transform"] for record in records))
    for i, text in enumerate(texts):
        own = [record for record in records if record["transform"] == text]
        times = [1e3 * median(record["seconds"]) for record in own]
        energy = [record["energy"] / record["best"] for record in own]
        axes[0].scatter(
            times, energy, label=text.replace("rank={rank}", "").replace("(, ", "(").replace("()", ""), color=f"C{i}"
        )
    axes[0].set(xscale="log", xlabel="ms a refresh", ylabel="energy captured / exact SVD's", title="refreshes, all shapes")
    axes[0].legend(fontsize=8)
    plotting.save(figure, path)


def _curves(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = _figure(len(found))
    for axis, (what, points) in zip(axes, found.items(), strict=True):
        at = [place(what, point["workload"]) for point in points]
        for i, key in enumerate(timing["key"] for timing in points[0]["steps"] if timing["key"] != FULL):
            ratios = []
            for point in points:
                by_key = {timing["key"]: timing for timing in point["steps"]}
                ratios.append(_against_full(by_key[key], by_key[FULL]))
            axis.plot(at, [r.middle for r in ratios], marker="o", markersize=3, label=key, color=f"C{i}")
            axis.fill_between(at, [r.low for r in ratios], [r.high for r in ratios], color=f"C{i}", alpha=0.15, linewidth=0)
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [str(value) for value in at])
        axis.set(xlabel=what)
    axes[0].set_ylabel("time of a step / full AdamW")
    axes[-1].legend(fontsize=7)
    plotting.save(figure, path)


def _figure(columns: int, height: float = 3.6) -> tuple[Any, list[Any]]:
    return plotting.figure((7.0 if columns == 1 else 3.4 * columns, height), columns)
