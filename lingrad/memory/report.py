"""One report of a run's memory, whatever it was filled from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lingrad.console import align
from lingrad.files.atomic import write_whole
from lingrad.memory.cuda.allocator import replay
from lingrad.memory.log import CATEGORIES, END_OF_STEP, Log
from lingrad.memory.units import readable

Source = Literal["simulated", "tracked", "measured"]

POINTS = 1000  # of a timeline
TOP = 10


@dataclass(frozen=True)
class Point:
    """The highest moment in one stretch of a run.

    Args:
        event: Its place: the number of storages made and freed before it.
        phase: The phase it is in.
        bytes: Bytes by category; those that have none are left out.
    """

    event: int
    phase: str
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class Top:
    """One of the largest storages at the peak.

    Args:
        nbytes: Its size.
        category: What it is for.
        phase: The phase that made it.
        op: The operator that made it; empty where it was there before.
    """

    nbytes: int
    category: str
    phase: str
    op: str


@dataclass(frozen=True)
class MemoryReport:
    """Where a run's memory goes. All sizes are bytes.

    Args:
        source: ``simulated`` on meta tensors, ``tracked`` from the tensors of a real run, or ``measured``, where the device's
            own allocator gave the peak.
        device: The device, or the one that is simulated.
        peak: The most that tensors asked for at one moment.
        steady: What they hold between steps, gradients included, as they are before they are zeroed.
        breakdown: The peak by category; sums to it.
        steady_breakdown: The same of ``steady``.
        by_phase: The most in each phase.
        timeline: The run, from its beginning.
        top: The largest storages at the peak.
        allocated: The most that an allocator hands out for it, which rounds each request up; None if not known.
        reserved: The most that the allocator takes from the device; None if not known.
        capacity: The memory of the device, if one was named.
        fits: Whether ``reserved`` stays within it.
        assumptions: What was taken for granted.
        log: Everything that happened.
    """

    source: Source
    device: str
    peak: int
    steady: int
    breakdown: Mapping[str, int]
    steady_breakdown: Mapping[str, int]
    by_phase: Mapping[str, int]
    timeline: Sequence[Point]
    top: Sequence[Top]
    allocated: int | None = None
    reserved: int | None = None
    capacity: int | None = None
    fits: bool | None = None
    assumptions: Sequence[str] = ()
    log: Log = field(default_factory=Log, repr=False, compare=False)

    def __str__(self) -> str:
        rows = [("", "at the peak", "share", "between steps")]
        for category in CATEGORIES:
            at, after = self.breakdown.get(category, 0), self.steady_breakdown.get(category, 0)
            if at or after:
                rows.append((category, readable(at), f"{at / self.peak:.1%}", readable(after)))
        rows.append(("all", readable(self.peak), "100.0%", readable(self.steady)))
        text = [f"{self.source} on {self.device}: {readable(self.peak)} at the peak, {readable(self.steady)} between steps"]
        if self.reserved is not None:
            rounded = "" if self.allocated is None else f", {readable(self.allocated)} of it in use at most"
            text.append(f"the allocator takes {readable(self.reserved)} from the device{rounded}")
        if self.capacity is not None:
            text.append(f"{'fits' if self.fits else 'does NOT fit'} in {readable(self.capacity)}")
        header, *lines = align(rows, right=[False, True, True, True])
        text += ["", "  ".join(header), "  ".join("-" * len(cell) for cell in header), *("  ".join(line) for line in lines), ""]
        text.append("highest in  " + ", ".join(f"{phase} {readable(n)}" for phase, n in self.by_phase.items()))
        text += ["", "largest at the peak"]
        tops = [(readable(top.nbytes), top.category, top.op or "(there before)", top.phase) for top in self.top]
        text += ["  " + "  ".join(line).rstrip() for line in align(tops, right=[True, False, False, False])] if tops else []
        if self.assumptions:
            text += ["", "assumed", *(f"  - {assumption}" for assumption in self.assumptions)]
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, without the log."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("log", "timeline", "top")}
        plain = {key: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for key, v in plain.items()}
        plain["timeline"] = [{"event": p.event, "phase": p.phase, "bytes": dict(p.bytes)} for p in self.timeline]
        plain["top"] = [{"nbytes": t.nbytes, "category": t.category, "phase": t.phase, "op": t.op} for t in self.top]
        return plain

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON.

        Args:
            path: Where to write it too, if anywhere.

        Returns:
            The text.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            write_whole(Path(path), text.encode())
        return text

    def plot(self, path: str | Path) -> Path:
        """Draw the run: what is alive, stacked by category.

        Args:
            path: The picture to write; its suffix says of what kind.

        Returns:
            The path.
        """
        from lingrad.memory.plots import draw_timeline

        return draw_timeline(self, Path(path))

    def to_snapshot(self, path: str | Path) -> Path:
        """Write a snapshot that torch's memory visualiser opens (pytorch.org/memory_viz).

        Args:
            path: The file to write, in torch's own format.

        Returns:
            The path.
        """
        from lingrad.memory.cuda.snapshot import to_snapshot, write_snapshot

        write_snapshot(to_snapshot(self.log), Path(path))
        return Path(path)


def summarize(
    log: Log,
    *,
    source: Source,
    device: str,
    capacity: int | None = None,
    expandable: bool = False,
    allocator: bool = False,
    preload: Sequence[int] = (),
    assumptions: Sequence[str] = (),
) -> MemoryReport:
    """Make the report of a log.

    Args:
        log: The log.
        source: Where it comes from.
        device: The device.
        capacity: The device's memory, in bytes.
        expandable: Model the allocator with expandable segments.
        allocator: Replay the log through the model of CUDA's allocator.
        preload: Bytes of allocations that the log does not have, such as cuBLAS workspaces.
        assumptions: What was taken for granted.

    Returns:
        The report.
    """
    base = sum(nbytes for _, nbytes, _ in log.before)
    peak, position = base, 0
    by_phase: dict[str, int] = {}
    for i, (total, _, phase) in enumerate(log.running(), start=1):
        by_phase[phase] = max(by_phase.get(phase, base), total)
        if total > peak:
            peak, position = total, i
    ends = [at for name, at in log.marks if name == END_OF_STEP] or [len(log.during)]
    live, steady = log.live_at(position), log.live_at(ends[-1])
    largest = sorted(live.items(), key=lambda item: -item[1])[:TOP]
    tops = tuple(Top(n, (s := log.storages[i]).category, s.phase, s.op) for i, n in largest)
    played = replay(log, expandable=expandable, preload=preload) if allocator else None
    fits = None
    if capacity is not None:
        fits = replay(log, capacity=capacity, expandable=expandable, preload=preload).fits if allocator else peak <= capacity
    return MemoryReport(
        source=source,
        device=device,
        peak=peak,
        steady=sum(steady.values()),
        breakdown=log.breakdown(live),
        steady_breakdown=log.breakdown(steady),
        by_phase=by_phase,
        timeline=tuple(_timeline(log)),
        top=tops,
        allocated=played.allocated if played else None,
        reserved=played.reserved if played else None,
        capacity=capacity,
        fits=fits,
        assumptions=tuple(assumptions),
        log=log,
    )


def _timeline(log: Log) -> list[Point]:
    """The highest moment in each of equal stretches of the log."""
    stretch = max(1, -(-len(log.during) // POINTS))
    order = {category: i for i, category in enumerate(CATEGORIES)}
    kinds = [order[storage.category] for storage in log.storages]
    now = [0] * len(CATEGORIES)
    for index, nbytes, _ in log.before:
        now[kinds[index]] += nbytes
    points = [(sum(now), 0, "before", list(now))]
    total = points[0][0]
    for i, (index, nbytes, phase) in enumerate(log.during):
        now[kinds[index]] += nbytes
        total += nbytes
        if i % stretch == 0:
            points.append((total, i + 1, phase, list(now)))
        elif total > points[-1][0]:
            points[-1] = (total, i + 1, phase, list(now))
    return [Point(event, phase, {CATEGORIES[k]: n for k, n in enumerate(held) if n}) for _, event, phase, held in points]
