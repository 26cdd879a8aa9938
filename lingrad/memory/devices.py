"""The peak of a run as the device's own allocator measures it: CUDA's counters, or the allocation events of the CPU."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, final

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from lingrad.errors import MemoryModelError
from lingrad.memory.log import Log
from lingrad.memory.report import MemoryReport, summarize
from lingrad.memory.units import readable

Prepared = TypeVar("Prepared")

_WINDOW = "lingrad: measured run"


@dataclass(frozen=True)
class Measured:
    """What an allocator measured of a run.

    Args:
        before: Bytes in use when the run began.
        peak: Peak of the bytes in use, ``before`` included.
        allocated: The same with each request rounded up as the allocator rounds it; None if not known.
        reserved: Peak of the bytes taken from the device; None if not known.
    """

    before: int
    peak: int
    allocated: int | None = None
    reserved: int | None = None


class Allocator(ABC):
    """The allocator of one device."""

    device: Literal["cuda", "cpu"]

    @abstractmethod
    def peak_of(self, prepare: Callable[[], Prepared], run: Callable[[Prepared], None]) -> Measured:
        """Run something and measure its peak.

        Args:
            prepare: Makes what exists when the run begins.
            run: The run to measure.

        Returns:
            What the allocator measured.
        """

    def report(self, log: Log, measured: Measured) -> MemoryReport:
        """The report of a run that was tracked and measured at the same time.

        Args:
            log: The tracker's log.
            measured: What the allocator measured.

        Returns:
            A report whose peak is the allocator's.

        Raises:
            MemoryModelError: The allocator measured less than the tracker, which is impossible for one run alone.
        """
        report = summarize(log, source="measured", device=self.device)
        known = sum(nbytes for _, nbytes, _ in log.before)
        # memory that was in use before and is not the run's does not count
        peak = measured.peak - measured.before + known
        breakdown = dict(report.breakdown)
        if peak > report.peak:
            breakdown["untracked"] = peak - report.peak
        elif peak < report.peak:
            raise MemoryModelError(
                f"the tracker saw {report.peak} bytes at the peak and the allocator {peak}: something else in this process "
                "freed memory during the run, such as another thread; measure in a process of its own"
            )
        others = measured.before - known
        assumed = [f"the peak is that of {self.device}'s allocator; the categories are those of the tracked tensors"]
        if measured.reserved is not None and others > 0:
            assumed.append(f"{readable(others)} in use before the run counts as reserved, and in no other figure")
        return replace(
            report,
            peak=peak,
            breakdown=breakdown,
            allocated=measured.allocated,
            reserved=measured.reserved,
            assumptions=tuple(assumed),
        )


@final
class CPUAllocator(Allocator):
    """The CPU's allocator, measured by the allocation events that torch's profiler records."""

    device = "cpu"

    @override
    def peak_of(self, prepare: Callable[[], Prepared], run: Callable[[Prepared], None]) -> Measured:
        gc.collect()  # garbage of earlier work would be freed during the run
        # the profiler knows the size of what is freed only if it recorded its allocation, so it records the preparation too
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            prepared = prepare()
            gc.collect()
            with record_function(_WINDOW):
                run(prepared)
        result = profiled.profiler.kineto_results
        begin = next(event.start_ns() for event in result.events() if event.name() == _WINDOW)
        events = sorted((e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]")
        before = sum(nbytes for when, nbytes in events if when < begin)
        now = peak = before
        for when, nbytes in events:
            if when >= begin:
                now += nbytes
                peak = max(peak, now)
        return Measured(before, peak)


@final
class CUDAAllocator(Allocator):
    """CUDA's caching allocator, measured by its counters."""

    device = "cuda"

    @override
    def peak_of(self, prepare: Callable[[], Prepared], run: Callable[[Prepared], None]) -> Measured:
        prepared = prepare()
        _allocate_workspaces()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        run(prepared)
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return Measured(
            before,
            stats["requested_bytes.all.peak"],
            stats["allocated_bytes.all.peak"],
            stats["reserved_bytes.all.peak"],
        )


def _allocate_workspaces() -> None:
    """Make cuBLAS allocate its workspaces, one for the thread of the forward and one for that of the backward."""
    x = torch.ones(8, 8, device="cuda", requires_grad=True)
    (x @ x).sum().backward()


def allocator_of(device: str | None) -> Allocator:
    """The allocator of a device.

    Args:
        device: ``cuda``, ``cpu``, or None for CUDA if there is a device, else the CPU.

    Returns:
        The allocator.

    Raises:
        MemoryModelError: There is no CUDA device, or the device is neither.
    """
    if device not in (None, "cuda", "cpu"):
        raise MemoryModelError(f"memory can be measured on 'cuda' and 'cpu', not on {device!r}")
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return CPUAllocator()
    if not torch.cuda.is_available():
        raise MemoryModelError(
            "there is no CUDA device to measure on (torch.cuda.is_available() is false), and torch would report 0 bytes; "
            "simulate it instead: lingrad.memory.simulate(...)"
        )
    return CUDAAllocator()


def resident_peak() -> int:
    """Peak resident memory of this process since its start or `reset_resident_peak`, in bytes; Linux only."""
    return _status("VmHWM")


def resident() -> int:
    """Resident memory of this process now, in bytes; Linux only."""
    return _status("VmRSS")


def reset_resident_peak() -> None:
    """Reset `resident_peak` to the present value; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise MemoryModelError("resident memory is read from /proc/self/status, which exists on Linux only") from error
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
