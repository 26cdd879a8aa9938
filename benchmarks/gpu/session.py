"""A run in parts that keeps to its time, goes on after failures, and writes its results as it goes."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import measure
from lingrad.errors import in_short
from lingrad.files.atomic import write_whole


class OutOfTimeError(BaseException):
    """The time of an item is over. No `Exception`, so that the code it interrupts does not handle it as its own."""


Item = tuple[str, Callable[[], dict[str, Any]]]  # a label, and what measures


class Session:
    """Measures items, part by part.

    Args:
        path: The JSON file; written after each item, whole.
        limit: Seconds for everything.
        about: What the file begins with.
    """

    def __init__(self, path: Path, limit: float, about: dict[str, Any]) -> None:
        self.path = path
        self.started = time.monotonic()
        self.limit = limit
        self.found: dict[str, Any] = {**about, "parts": {}}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def save(self) -> None:
        """Write the results so far."""
        self.found["seconds"] = self.elapsed
        write_whole(self.path, json.dumps(self.found, indent=1).encode())

    def part(self, name: str, budget: float, items: Iterable[Item], each: float | None = None) -> None:
        """Measure the items of a part; an item that fails is recorded, and one for which there is no time is left out.

        Args:
            name: Of the part.
            budget: Its seconds; an item that has begun is interrupted when they are over.
            items: Its items, the most important first.
            each: The most seconds of one item, so that no compiler takes the time of all; as many as the part has by default.
        """
        began = time.monotonic()
        into: dict[str, Any] = {"entries": [], "failures": [], "left out": []}
        self.found["parts"][name] = into
        for label, work in items:
            left = min(budget - (time.monotonic() - began), self.limit - self.elapsed, each or budget)
            if left <= 0:
                into["left out"].append(label)
                continue
            measure.say(f"{self.elapsed:4.0f} s  {name}: {label}")
            try:
                with _interrupted_after(left):
                    into["entries"].append({"label": label, **work()})
            except (Exception, OutOfTimeError) as error:  # whatever fails, the rest is measured
                measure.say(f"{self.elapsed:4.0f} s  {name}: {label} failed: {in_short(error)}")
                into["failures"].append({"label": label, "error": in_short(error)})
            into["seconds"] = time.monotonic() - began
            self.save()
        self.save()


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` inside after some seconds, where the platform can do so.

    Args:
        seconds: How many.

    Yields:
        None.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(*_: Any) -> None:
        raise OutOfTimeError(f"interrupted after {seconds:.0f} s, the time that was left")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
