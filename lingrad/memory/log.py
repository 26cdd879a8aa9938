"""The log of a run's memory: every storage, when it was allocated and freed, and by which operator.

Bytes are those that a tensor's storage asks for, before an allocator rounds them up. A storage is labelled as soon as its
purpose is known (a tensor is known to be a gradient when autograd accumulates it); categories are decided at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# What a storage is for. Temporaries are divided by the phase in which they were allocated.
CATEGORIES = (
    "weight",  # parameters that are trained, transformed or in full
    "frozen",  # parameters that are not trained
    "gathered",  # weights of all processes, which fully_shard gathers for a layer
    "buffer",
    "gradient",  # of parameters trained in full
    "coords",
    "coords gradient",
    "basis",  # the state of a transform: bases, indices, the optimizer state of a learned basis
    "moments",  # the base optimizer's state
    "activations",  # allocated in a forward, or in a recomputation, and alive after it
    "input",
    "temporaries: forward",
    "temporaries: backward",
    "temporaries: step",
    "other",  # existed before the log began, purpose unknown
    "untracked",  # measured by the allocator, not seen by the tracker: workspaces of kernels
)

BEFORE, FORWARD, BACKWARD, RECOMPUTE, STEP = "before", "forward", "backward", "recompute", "step"
END_OF_STEP = "end of step"  # a mark: between two steps, gradients not yet zeroed


@dataclass(slots=True, eq=False)
class Storage:
    """One storage.

    Args:
        index: Its number in the log.
        nbytes: Bytes requested; after a resize, the new size.
        phase: The phase in which it was allocated.
        op: The operator that allocated it; empty if not known.
        label: Its category, if known; see `category`.
        freed_in: The phase in which it was freed; None while it is alive.
    """

    index: int
    nbytes: int
    phase: str
    op: str
    label: str | None = None
    freed_in: str | None = None

    @property
    def category(self) -> str:
        """What it is for: its label, or else what follows from the phases in which it was allocated and freed."""
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
        before: Events for what existed when the log began.
        during: Events since then, in order: (index of the storage, bytes allocated or, if negative, freed, phase).
        marks: (name, number of events of ``during`` before it): named positions in the run, such as ``end of step``.
        host: The same of what a run with ``offload`` has in host memory; None in that log itself.
    """

    storages: list[Storage] = field(default_factory=list)
    before: list[tuple[int, int, str]] = field(default_factory=list)
    during: list[tuple[int, int, str]] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    host: Log | None = None

    @property
    def events(self) -> list[tuple[int, int, str]]:
        """All events: ``before``, then ``during``."""
        return self.before + self.during

    def add(self, nbytes: int, phase: str, op: str = "", label: str | None = None) -> Storage:
        """Record a new storage.

        Args:
            nbytes: Bytes requested.
            phase: The phase; `BEFORE` if it existed when the log began.
            op: The operator that allocated it.
            label: Its category, if known.

        Returns:
            The storage.
        """
        storage = Storage(len(self.storages), nbytes, phase, op, label)
        self.storages.append(storage)
        (self.before if phase == BEFORE else self.during).append((storage.index, nbytes, phase))
        return storage

    def free(self, storage: Storage, phase: str) -> None:
        """Record that a storage was freed."""
        storage.freed_in = phase
        if storage.nbytes:
            self.during.append((storage.index, -storage.nbytes, phase))

    def resize(self, storage: Storage, nbytes: int, phase: str) -> None:
        """Record that a storage was resized: the old memory is freed, new memory is allocated."""
        self.during += [(storage.index, change, phase) for change in (-storage.nbytes, nbytes) if change]
        storage.nbytes = nbytes

    def mark(self, name: str) -> None:
        """Name the present position in the run."""
        self.marks.append((name, len(self.during)))

    def live_at(self, position: int) -> dict[int, int]:
        """The storages that are alive after the first ``position`` events of ``during``.

        Args:
            position: How many events.

        Returns:
            Index of the storage -> bytes.
        """
        live: Counter[int] = Counter()
        for index, nbytes, _ in self.before + self.during[:position]:
            live[index] += nbytes
        return {index: nbytes for index, nbytes in live.items() if nbytes}

    def breakdown(self, live: dict[int, int]) -> dict[str, int]:
        """Bytes by category, in the order of `CATEGORIES`; categories without bytes are left out."""
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
