"""The parts of CUDA's caching allocator: blocks, which tile segments, and pools, which keep the free blocks sorted."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from lingrad.errors import LingradError
from lingrad.memory.units import readable

MIB = 1 << 20
MIN_BLOCK = 512
SMALL_REQUEST = MIB  # the largest request of the small pool, and the largest remainder that the large pool does not split off
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # a request of at least this size gets a segment of its own size
OWN_SEGMENT_STEP = 2 * MIB

# Observed on an H100 with CUDA 13: cudaMalloc cuts segments off chunks whose size is a multiple of this. Each new chunk lies
# below the last one, and room in existing chunks is used first, the lowest address first.
DRIVER_CHUNK = 32 * MIB

# The address range of a pool starts at a multiple of this and has this length: a multiple of both granules, larger than any
# device's memory.
SPAN = LARGE_SEGMENT << 20

SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP = "segment_alloc", "segment_free", "segment_map", "segment_unmap"


class DeviceCall(NamedTuple):
    """A call to the device: the action as torch's snapshots name it, the address, and the size in bytes."""

    action: str
    address: int
    size: int


class OutOfMemory(LingradError):  # noqa: N818 - named as torch's own message begins
    """The device has no memory left for a request, even after the cache was emptied."""


@dataclass(slots=True, eq=False)
class Block:
    """A range of addresses; blocks tile a segment.

    Args:
        pool: The pool it belongs to.
        address: Its first byte.
        size: Bytes.
        mapped: Whether the addresses are backed by memory; always true outside expandable segments.
        requested: Bytes requested while it is live; 0 while it is free.
        previous: The next lower block of the segment, if any.
        next: The next higher block of the segment, if any.
    """

    pool: Pool = field(repr=False)
    address: int
    size: int
    mapped: bool = True
    requested: int = 0
    previous: Block | None = field(default=None, repr=False)
    next: Block | None = field(default=None, repr=False)

    @property
    def live(self) -> bool:
        """Whether it is in use."""
        return self.requested > 0

    def cut(self, size: int) -> Block:
        """Split off everything above the lower ``size`` bytes; the new block, in the same state, is returned."""
        upper = Block(self.pool, self.address + size, self.size - size, self.mapped, previous=self, next=self.next)
        if upper.next is not None:
            upper.next.previous = upper
        self.next, self.size = upper, size
        return upper

    def join(self) -> Block:
        """Merge with the free neighbours in the same state, which leave their pool's lists; the merged block is returned."""
        lowest = self
        if self.previous is not None and self.previous.mergeable(self):
            lowest = self.previous
            self.pool.take(lowest)
            lowest._absorb(self)  # the lowest block survives, so that a segment's first block stays the same object
        if lowest.next is not None and lowest.next.mergeable(lowest):
            self.pool.take(lowest.next)
            lowest._absorb(lowest.next)
        return lowest

    def mergeable(self, other: Block) -> bool:
        """Whether it is free, and mapped exactly if the other is."""
        return not self.live and self.mapped == other.mapped

    def _absorb(self, above: Block) -> None:
        self.size, self.next = self.size + above.size, above.next
        if above.next is not None:
            above.next.previous = self


class Pool:
    """The free and the unmapped blocks of one kind of request.

    Args:
        small: Whether it is the pool for requests of at most 1 MiB.
    """

    def __init__(self, small: bool) -> None:
        self.small = small
        self.granule = SMALL_SEGMENT if small else LARGE_SEGMENT
        self.free: list[tuple[int, int]] = []  # (size, address), sorted: the order of best fit
        self.unmapped: list[tuple[int, int]] = []  # (0, address)
        self.at: dict[int, Block] = {}  # free and unmapped blocks, by address

    def put(self, block: Block) -> None:
        """Add a free or unmapped block."""
        insort(self.free if block.mapped else self.unmapped, (block.size if block.mapped else 0, block.address))
        self.at[block.address] = block

    def take(self, block: Block) -> None:
        """Remove a block."""
        blocks = self.free if block.mapped else self.unmapped
        del blocks[bisect_left(blocks, (block.size if block.mapped else 0, block.address))]
        del self.at[block.address]

    def best_fit(self, size: int) -> Block | None:
        """The free block for a request of ``size`` bytes, or None; it stays in the pool."""
        start = bisect_left(self.free, (size, 0))
        best = None
        for _, address in islice(self.free, start, None):
            block = self.at[address]
            # the last block of an expandable segment counts with all it can grow to, so that it is used last
            if best is not None and _room(block) >= _room(best):
                break
            best = block
        return best

    def lowest_fit(self, size: int) -> Block:
        """The lowest block of a run of free and unmapped blocks that hold ``size`` bytes together. Raises `OutOfMemory`."""
        for _, address in self.unmapped:
            hole = self.at[address]
            first = hole if hole.previous is None or hole.previous.live else hole.previous
            room, block = 0, first
            while room < size and not block.live:
                room += block.size
                if block.next is None:
                    break
                block = block.next
            if room >= size:
                return first
        raise OutOfMemory(f"Out of addresses: no device has the requested {readable(size)}.")


def round_up(nbytes: int, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``nbytes``."""
    return -(-nbytes // step) * step


def _room(block: Block) -> int:
    """The size a free block can grow to: its own and that of the unmapped block right above it."""
    return block.size + (block.next.size if block.next is not None and not block.next.mapped else 0)
