"""The log of a run's memory: every storage, when it was made and freed, and by what; the one form that all sources fill.

Bytes are those a tensor's storage asks for, before any allocator rounds them. Labels are attached to storages whenever they
become known (a tensor turns out to be a gradient when autograd accumulates it), so that categories are decided at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# What a storage is for. Temporaries are told apart by the phase that made them.
CATEGORIES = (
    "weight",  # parameters that are trained, transformed or in full
    "frozen",  # parameters that are not
    "buffer",
    "gradient",  # of parameters trained in full
    "coords",
    "coords gradient",
    "basis",  # what a transform keeps: bases, indices, the memory of a learned basis
    "moments",  # the base optimizer's state
    "activations",  # made in a forward, or a checkpoint's recomputation, and alive after it
    "input",
    "temporaries: forward",
    "temporaries: backward",
    "temporaries: step",
    "other",  # was there before the log began, and nobody said what it is
    "untracked",  # seen by the allocator, not by the tracker: workspaces of kernels
)

BEFORE, FORWARD, BACKWARD, RECOMPUTE, STEP = "before", "forward", "backward", "recompute", "step"
END_OF_STEP = "end of step"  # a mark: between steps, gradients not yet zeroed


@dataclass(slots=True, eq=False)
class Storage:
    """One piece of memory.

    Args:
        index: Its number in the log.
        nbytes: Bytes asked for; the last, where it was resized.
        phase: The phase that made it.
        op: The operator that made it; empty where that is not known.
        label: Its category, where that is known; see `category`.
        freed_in: The phase that freed it; None while it lives.
    """

    index: int
    nbytes: int
    phase: str
    op: str
    label: str | None = None
    freed_in: str | None = None

    @property
    def category(self) -> str:
        """What it is for: its label, or else what the phases of its making and its end say."""
        if self.label is not None:
            return self.label
        if self.phase == BEFORE:
            return "other"
        if self.phase == RECOMPUTE or (self.phase == FORWARD and self.freed_in != FORWARD):
            return "activations"
        return f"temporaries: {self.phase}"


@dataclass
class Log:
    """Storages, and what happened to them in order.

    Attributes:
        storages: All of them, by index.
        before: What was there when the log began, as events.
        during: (index of the storage, bytes gained or lost, phase), in order.
        marks: (name, number of events in ``during`` before it): places in the run, such as ``end of step``.
    """

    storages: list[Storage] = field(default_factory=list)
    before: list[tuple[int, int, str]] = field(default_factory=list)
    during: list[tuple[int, int, str]] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)

    @property
    def events(self) -> list[tuple[int, int, str]]:
        """All events: what was there before, then what happened."""
        return self.before + self.during

    def add(self, nbytes: int, phase: str, op: str = "", label: str | None = None) -> Storage:
        """Note a storage that was made, or found.

        Args:
            nbytes: Bytes it asks for.
            phase: The phase; `BEFORE` where it was there when the log began.
            op: The operator that made it.
            label: Its category, if known.

        Returns:
            The storage.
        """
        storage = Storage(len(self.storages), nbytes, phase, op, label)
        self.storages.append(storage)
        (self.before if phase == BEFORE else self.during).append((storage.index, nbytes, phase))
        return storage

    def free(self, storage: Storage, phase: str) -> None:
        """Note that a storage is gone."""
        storage.freed_in = phase
        self.during.append((storage.index, -storage.nbytes, phase))

    def resize(self, storage: Storage, nbytes: int, phase: str) -> None:
        """Note that a storage was given another size: the old memory is freed, new memory is taken."""
        self.during.append((storage.index, -storage.nbytes, phase))
        self.during.append((storage.index, nbytes, phase))
        storage.nbytes = nbytes

    def mark(self, name: str) -> None:
        """Name the present place in the run."""
        self.marks.append((name, len(self.during)))

    def live_at(self, position: int) -> dict[int, int]:
        """What is alive after some of ``during``'s events.

        Args:
            position: How many of them.

        Returns:
            Index of the storage -> bytes.
        """
        live: Counter[int] = Counter()
        for index, nbytes, _ in self.before + self.during[:position]:
            live[index] += nbytes
        return {index: nbytes for index, nbytes in live.items() if nbytes}

    def breakdown(self, live: dict[int, int]) -> dict[str, int]:
        """Bytes by category, in the order of `CATEGORIES`, without those that have none."""
        found: Counter[str] = Counter()
        for index, nbytes in live.items():
            found[self.storages[index].category] += nbytes
        return {category: found[category] for category in CATEGORIES if found[category]}

    def running(self) -> Iterator[tuple[int, int, str]]:
        """(bytes alive, index of the storage, phase) after each event of ``during``."""
        total = sum(nbytes for _, nbytes, _ in self.before)
        for index, nbytes, phase in self.during:
            total += nbytes
            yield total, index, phase
