"""What CUDA's allocator is made of: blocks that tile segments, and the pools that keep the free ones in order."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from lingrad.errors import LingradError
from lingrad.memory.units import readable

MIB = 1 << 20
MIN_BLOCK = 512
SMALL_REQUEST = MIB  # the largest request of the small pool, and the largest rest the large pool leaves in a block
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB  # from here on a request gets a segment of its own size
OWN_SEGMENT_STEP = 2 * MIB

# Seen on an H100 with CUDA 13: cudaMalloc cuts segments off pieces of a multiple of this, each piece below the last, and
# looks for room in the pieces it has at the lowest address first.
DRIVER_PIECE = 32 * MIB

# A multiple of both granules, and more than any device has: where a pool's addresses begin, and how many it has.
SPAN = LARGE_SEGMENT << 20

SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP = "segment_alloc", "segment_free", "segment_map", "segment_unmap"


class DeviceCall(NamedTuple):
    """What the allocator had the device do, in the words of torch's snapshots, with how many bytes, and where."""

    action: str
    address: int
    size: int


class OutOfMemory(LingradError):  # noqa: N818 - named as torch's own message begins
    """The device has no memory left for a request, though all that could be given back was."""


@dataclass(slots=True, eq=False)
class Block:
    """A range of addresses, one of those that a segment is made of.

    Args:
        pool: The pool it belongs to.
        address: Its first byte.
        size: Bytes.
        mapped: Whether there is memory behind the addresses; always so outside expandable segments.
        requested: Bytes asked for while it is live; 0 while it is free.
        previous: The block below in the segment, if any.
        next: The block above in the segment, if any.
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
        """Whether it is handed out."""
        return self.requested > 0

    def cut(self, size: int) -> Block:
        """Keep the lower ``size`` bytes; the rest is a new block, in the same state, and returned."""
        rest = Block(self.pool, self.address + size, self.size - size, self.mapped, previous=self, next=self.next)
        if rest.next is not None:
            rest.next.previous = rest
        self.next, self.size = rest, size
        return rest

    def join(self) -> Block:
        """Take in the free neighbours in the same state, which leave their pool's shelves; the whole is returned."""
        lowest = self
        if self.previous is not None and self.previous.like(self):
            lowest = self.previous
            self.pool.take(lowest)
            lowest._absorb(self)  # the lowest block lives on, so that a segment's first block stays the same object
        if lowest.next is not None and lowest.next.like(lowest):
            self.pool.take(lowest.next)
            lowest._absorb(lowest.next)
        return lowest

    def like(self, other: Block) -> bool:
        """Whether it is free, and mapped or not as the other is."""
        return not self.live and self.mapped == other.mapped

    def _absorb(self, above: Block) -> None:
        self.size, self.next = self.size + above.size, above.next
        if above.next is not None:
            above.next.previous = self


class Pool:
    """The free and the unmapped blocks of one kind of request.

    Args:
        small: Whether it serves the requests of at most 1 MiB.
    """

    def __init__(self, small: bool) -> None:
        self.small = small
        self.granule = SMALL_SEGMENT if small else LARGE_SEGMENT
        self.free: list[tuple[int, int]] = []  # (size, address): in the order of best fit
        self.unmapped: list[tuple[int, int]] = []  # (0, address)
        self.at: dict[int, Block] = {}  # both kinds, by address

    def put(self, block: Block) -> None:
        """Shelve a block."""
        insort(self.free if block.mapped else self.unmapped, (block.size if block.mapped else 0, block.address))
        self.at[block.address] = block

    def take(self, block: Block) -> None:
        """Take a block off its shelf."""
        shelf = self.free if block.mapped else self.unmapped
        del shelf[bisect_left(shelf, (block.size if block.mapped else 0, block.address))]
        del self.at[block.address]

    def best_fit(self, size: int) -> Block | None:
        """The free block that a request of ``size`` bytes takes, still shelved, or None."""
        start = bisect_left(self.free, (size, 0))
        best = None
        for _, address in islice(self.free, start, None):
            block = self.at[address]
            # the end of an expandable segment counts with all it can grow to, so that it is taken last
            if best is not None and _room(block) >= _room(best):
                break
            best = block
        return best

    def lowest_fit(self, size: int) -> Block:
        """The first of the free and unmapped blocks, at the lowest address, that make up ``size`` bytes together."""
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
        raise OutOfMemory(f"Out of addresses: no device has the {readable(size)} requested.")


def round_up(nbytes: int, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``nbytes``."""
    return -(-nbytes // step) * step


def _room(block: Block) -> int:
    """What a free block can grow to: itself and the addresses without memory right above it."""
    return block.size + (block.next.size if block.next is not None and not block.next.mapped else 0)
