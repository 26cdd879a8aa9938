"""The report of a run's memory: the same class for a simulated, a tracked and a measured run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lingrad.console import columns
from lingrad.files.atomic import write_whole
from lingrad.memory.cuda.allocator import replay
from lingrad.memory.cuda.snapshot import to_snapshot, write_snapshot
from lingrad.memory.log import CATEGORIES, END_OF_STEP, Log
from lingrad.memory.plots import draw_timeline
from lingrad.memory.units import beside, readable

Source = Literal["simulated", "tracked", "measured"]

POINTS = 1000  # of a timeline
TOP = 10
WORDS = (
    "requested: what tensors ask for, as the peak is counted; allocated: the allocator's blocks for them, each rounded up;\n"
    "reserved: what the allocator takes from the device, which decides whether a run fits"
)


@dataclass(frozen=True)
class Point:
    """The moment of one interval of a run at which most memory is in use.

    Args:
        event: Its position: how many storages were allocated and freed before it.
        phase: The phase of the run at that moment.
        bytes: Bytes by category; categories without bytes are left out.
    """

    event: int
    phase: str
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class Top:
    """One of the largest storages at the peak.

    Args:
        nbytes: Its size in bytes.
        category: What it is for.
        phase: The phase in which it was allocated.
        op: The operator that allocated it; empty if it existed before the run.
    """

    nbytes: int
    category: str
    phase: str
    op: str


@dataclass(frozen=True)
class MemoryReport:
    """Where a run's memory goes. All sizes are bytes.

    Args:
        source: ``simulated`` on meta tensors, ``tracked`` from the tensors of a real run, or ``measured``, where the peak comes
            from the device's own allocator.
        device: The device, or the simulated device.
        peak: The largest sum of the sizes that live tensors asked for.
        steady: The same sum between steps, gradients included (they have not been zeroed yet).
        breakdown: The peak by category; sums to ``peak``.
        steady_breakdown: ``steady`` by category; sums to ``steady``.
        host: What ``offload`` has put in host memory, at the end of the run, by category; in no other figure.
        by_phase: The peak within each phase.
        timeline: The run from start to end, at most about 1000 points.
        top: The largest storages at the peak.
        allocated: Peak of the blocks that the allocator hands out; it rounds each request up. None if not known.
        reserved: Peak of what the allocator takes from the device. None if not known.
        capacity: The memory of the device, if it was given.
        context: What the CUDA context takes of ``capacity``.
        fits: Whether the run fits in ``capacity``; None without a capacity.
        assumptions: What the figures assume, one sentence each.
        log: Every allocation and every free.
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
    context: int = 0
    fits: bool | None = None
    assumptions: Sequence[str] = ()
    host: Mapping[str, int] = field(default_factory=dict)
    log: Log = field(default_factory=Log, repr=False, compare=False)

    def __str__(self) -> str:
        rows = [("", "at the peak", "share", "between steps")]
        for category in CATEGORIES:
            at, after = self.breakdown.get(category, 0), self.steady_breakdown.get(category, 0)
            if at or after:
                rows.append((category, readable(at), f"{at / self.peak:.1%}", readable(after)))
        rows.append(("all", readable(self.peak), "100.0%", readable(self.steady)))
        found = f"{readable(self.peak)} requested at the peak, {readable(self.steady)} between steps"
        text = [f"{self.source} on {self.device}: {found}"]
        if self.reserved is not None:
            allocated = "" if self.allocated is None else f"{readable(self.allocated)} allocated, "
            text.append(f"{allocated}{readable(self.reserved)} reserved")
        if self.host:
            parts = ", ".join(f"{readable(n)} of {category}" for category, n in self.host.items())
            text.append(f"in host memory between steps: {parts}")
        if self.capacity is not None:
            text.append(f"{'fits' if self.fits else 'does NOT fit'} in {readable(self.capacity)}{beside(self.context)}")
        text += [] if self.reserved is None else ["", WORDS]
        text += ["", *columns(rows, right=[False, True, True, True], rule=True), ""]
        text.append("peak by phase  " + ", ".join(f"{phase} {readable(n)}" for phase, n in self.by_phase.items()))
        text += ["", "largest at the peak"]
        tops = [(readable(top.nbytes), top.category, top.op or "(before the run)", top.phase) for top in self.top]
        text += ["  " + line for line in columns(tops, right=[True, False, False, False])]
        if self.assumptions:
            text += ["", "assumed", *(f"  - {assumption}" for assumption in self.assumptions)]
        return "\n".join(text)

    @property
    def by_step(self) -> tuple[dict[str, int], ...]:
        """The peak of each step: bytes by category at the moment of the step at which most memory is in use."""
        totals = [total for total, _, _ in self.log.running()]
        ends = sorted({at for name, at in self.log.marks if name == END_OF_STEP and at > 0})
        peaks = [max(range(start, end), key=totals.__getitem__) for start, end in zip([0, *ends], ends, strict=False)]
        return tuple(self.log.breakdown(self.log.live_at(peak + 1)) for peak in peaks)

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, texts, lists and dicts, without the log."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("log", "timeline", "top")}
        plain = {key: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for key, v in plain.items()}
        plain["timeline"] = [{"event": p.event, "phase": p.phase, "bytes": dict(p.bytes)} for p in self.timeline]
        plain["top"] = [{"nbytes": t.nbytes, "category": t.category, "phase": t.phase, "op": t.op} for t in self.top]
        return plain

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON.

        Args:
            path: A file to write it to as well.

        Returns:
            The JSON text.
        """
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            write_whole(Path(path), text.encode())
        return text

    def plot(self, path: str | Path) -> Path:
        """Plot the memory in use over the run, stacked by category.

        Args:
            path: The picture to write; its suffix decides the format.

        Returns:
            The path.
        """
        title = f"{self.source} on {self.device}: {self.peak / 2**30:.2f} GiB at the peak"
        return draw_timeline([(point.event, point.bytes) for point in self.timeline], Path(path), peak=self.peak, title=title)

    def to_snapshot(self, path: str | Path) -> Path:
        """Write a snapshot for torch's memory visualizer (pytorch.org/memory_viz).

        Args:
            path: The file to write, in torch's own format.

        Returns:
            The path.
        """
        write_snapshot(to_snapshot(self.log), Path(path))
        return Path(path)


def summarize(
    log: Log,
    *,
    source: Source,
    device: str,
    capacity: int | None = None,
    context: int = 0,
    expandable: bool = False,
    allocator: bool = False,
    preload: Sequence[int] = (),
    assumptions: Sequence[str] = (),
) -> MemoryReport:
    """Compute the report of a log.

    Args:
        log: The log.
        source: Where the log comes from.
        device: The device.
        capacity: The device's memory in bytes.
        context: What the CUDA context takes of it.
        expandable: Model the allocator with expandable segments.
        allocator: Replay the log through the model of CUDA's allocator.
        preload: Bytes of allocations that are not in the log, such as cuBLAS workspaces.
        assumptions: What the figures assume.

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
    host = {} if log.host is None else log.host.breakdown(log.host.live_at(len(log.host.during)))
    largest = sorted(live.items(), key=lambda item: -item[1])[:TOP]
    tops = tuple(Top(n, (s := log.storages[i]).category, s.phase, s.op) for i, n in largest)
    played = replay(log, expandable=expandable, preload=preload) if allocator else None
    left = None if capacity is None else max(0, capacity - context)
    fits = None if left is None else peak <= left
    if played is not None and left is not None:
        within = replay(log, capacity=left, expandable=expandable, preload=preload)
        fits = within.fits
        played = within if fits else played  # an allocator without a limit does not give back what lies idle
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
        context=0 if capacity is None else context,
        fits=fits,
        assumptions=tuple(assumptions),
        host=host,
        log=log,
    )


def _timeline(log: Log) -> list[Point]:
    """The peak of each of many intervals of equal length."""
    interval = max(1, -(-len(log.during) // POINTS))
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
        if i % interval == 0:
            points.append((total, i + 1, phase, list(now)))
        elif total > points[-1][0]:
            points[-1] = (total, i + 1, phase, list(now))
    return [Point(event, phase, {CATEGORIES[k]: n for k, n in enumerate(used) if n}) for _, event, phase, used in points]
