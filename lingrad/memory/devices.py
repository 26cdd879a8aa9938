"""What a device's own allocator says: CUDA's counters, or the CPU's allocator events."""

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
class Found:
    """What an allocator saw of a run.

    Args:
        before: Bytes in use when it began.
        peak: The most in use at one moment, what was there before included.
        allocated: The same with each request rounded up as the allocator does; None if it does not say.
        reserved: The most it held of the device; None if it does not say.
    """

    before: int
    peak: int
    allocated: int | None = None
    reserved: int | None = None


class Allocator(ABC):
    """The allocator of one device."""

    device: Literal["cuda", "cpu"]

    @abstractmethod
    def peak_of(self, prepare: Callable[[], Prepared], run: Callable[[Prepared], None]) -> Found:
        """Run something and say what it took.

        Args:
            prepare: Makes what is there when the run begins.
            run: The run, whose peak counts.

        Returns:
            What the allocator saw.
        """

    def report(self, log: Log, found: Found) -> MemoryReport:
        """The report of a run that was tracked while its allocator was watched.

        Args:
            log: What the tracker saw.
            found: What the allocator saw.

        Returns:
            A report whose peak is the allocator's.

        Raises:
            MemoryModelError: The allocator saw less than the tracker, which cannot be.
        """
        report = summarize(log, source="measured", device=self.device)
        known = sum(nbytes for _, nbytes, _ in log.before)
        # what was in use before and is none of the run's stays out
        peak = found.peak - found.before + known
        breakdown = dict(report.breakdown)
        if peak > report.peak:
            breakdown["untracked"] = peak - report.peak
        elif peak < report.peak:
            raise MemoryModelError(
                f"the tracker saw {report.peak} bytes at the peak and the allocator {peak}: something else in this process "
                "freed memory meanwhile, such as another thread; measure in a process of its own"
            )
        others = found.before - known
        assumed = [f"the peak is that of {self.device}'s allocator; categories are those of the tensors tracked beside it"]
        if found.reserved is not None and others > 0:
            assumed.append(f"{readable(others)} that was in use before is in what the allocator takes, and in nothing else")
        return replace(
            report,
            peak=peak,
            breakdown=breakdown,
            allocated=found.allocated,
            reserved=found.reserved,
            assumptions=tuple(assumed),
        )


@final
class CPUAllocator(Allocator):
    """The CPU's, by the events that torch's profiler records of it."""

    device = "cpu"

    @override
    def peak_of(self, prepare: Callable[[], Prepared], run: Callable[[Prepared], None]) -> Found:
        gc.collect()  # what earlier work left behind would be freed during the run
        # the profiler knows the size of what is freed only where it saw it made, so that it watches the making of the model too
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
        return Found(before, peak)


@final
class CUDAAllocator(Allocator):
    """CUDA's caching allocator, by its counters."""

    device = "cuda"

    @override
    def peak_of(self, prepare: Callable[[], Prepared], run: Callable[[Prepared], None]) -> Found:
        prepared = prepare()
        _take_workspaces()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        run(prepared)
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return Found(
            before,
            stats["requested_bytes.all.peak"],
            stats["allocated_bytes.all.peak"],
            stats["reserved_bytes.all.peak"],
        )


def _take_workspaces() -> None:
    """Have cuBLAS take its workspaces, which it does once for each thread: that of the forward and that of the backward."""
    x = torch.ones(8, 8, device="cuda", requires_grad=True)
    (x @ x).sum().backward()


def allocator_of(device: str | None) -> Allocator:
    """The allocator of a device.

    Args:
        device: ``cuda``, ``cpu``, or None for CUDA where there is one.

    Returns:
        The allocator.

    Raises:
        MemoryModelError: CUDA is asked for and there is none, or the device is another.
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
    """The most memory this process had resident since it began, or since `reset_resident_peak`, in bytes; Linux only."""
    return _status("VmHWM")


def resident() -> int:
    """The memory this process has resident now, in bytes; Linux only."""
    return _status("VmRSS")


def reset_resident_peak() -> None:
    """Let `resident_peak` begin anew; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise MemoryModelError("resident memory is read from /proc/self/status, which only Linux has") from error
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
