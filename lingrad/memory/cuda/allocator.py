"""A model of the allocator that PyTorch puts between tensors and the memory of a GPU, for one stream.

The rules are those of ``c10::cuda::CUDACachingAllocator`` with its default settings. Sizes are rounded up to 512 B. Requests
of at most 1 MiB share the small pool, the others the large one. A request takes the smallest free block of its pool that
holds it, of these the one at the lowest address, and what is left over becomes a block again where it is worth it; a freed
block is joined with its free neighbours. Where no block fits, the device is asked for a segment, and segments are kept when
they are empty. Only when the device has no more are the empty ones given back.

With ``expandable`` (``expandable_segments:True``) each pool has one segment that grows: addresses are plenty, and memory is
mapped to them in granules of 2 MiB (small pool) or 20 MiB (large pool). Any granule that no live block touches can be given
back, wherever it lies.

The allocator would first give back single blocks above ``max_split_size``, but without that setting, which is the default,
there are none; the same holds for its garbage collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lingrad.errors import ModeError, SpecError
from lingrad.memory.cuda.blocks import (
    DRIVER_PIECE,
    MIN_BLOCK,
    OWN_SEGMENT,
    OWN_SEGMENT_STEP,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
    SMALL_REQUEST,
    SPAN,
    Block,
    DeviceCall,
    OutOfMemory,
    Pool,
    round_up,
)
from lingrad.memory.log import Log
from lingrad.memory.units import readable


class CachingAllocator:
    """The allocator; see the module.

    Args:
        capacity: Bytes the device has for it; None for as many as it takes.
        expandable: Whether segments are expandable.

    Attributes:
        requested: Bytes of the live blocks, as they were asked for.
        allocated: Bytes of the live blocks: what ``torch.cuda.memory_allocated`` reports.
        reserved: Bytes taken from the device: what ``torch.cuda.memory_reserved`` reports.
        peak_requested: The most ``requested`` ever was.
        peak_allocated: The most ``allocated`` ever was.
        peak_reserved: The most ``reserved`` ever was.
        retries: How often the device had no more and the cache was given back: torch's ``num_alloc_retries``.
        calls: All that the device was made to do, in order.
    """

    def __init__(self, *, capacity: int | None = None, expandable: bool = False) -> None:
        self.capacity, self.expandable = capacity, expandable
        self.requested = self.allocated = self.reserved = 0
        self.peak_requested = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self.calls: list[DeviceCall] = []
        self._small, self._large = Pool(small=True), Pool(small=False)
        self._heads: dict[int, Block] = {}  # the first block of every segment, by address
        self._lowest_address = SPAN
        self._holes: list[tuple[int, int]] = []  # (address, size): what segments left of the driver's pieces
        if expandable:
            for start, pool in ((SPAN, self._small), (2 * SPAN, self._large)):
                self._heads[start] = Block(pool, start, SPAN, mapped=False)
                pool.put(self._heads[start])

    @property
    def device_allocs(self) -> int:
        """Calls of cudaMalloc, or mappings into an expandable segment: torch's ``num_device_alloc``."""
        return sum(call.action in (SEGMENT_ALLOC, SEGMENT_MAP) for call in self.calls)

    def malloc(self, nbytes: int) -> Block:
        """Hand out memory.

        Args:
            nbytes: Bytes; at least 1, as torch does not ask for storages without bytes.

        Returns:
            The block.

        Raises:
            SpecError: There is nothing to hand out.
            OutOfMemory: The capacity does not suffice. What was handed out before stays so.
        """
        if nbytes < 1:
            raise SpecError(f"a block has at least 1 byte, not {nbytes}", option="nbytes")
        size = round_up(nbytes, MIN_BLOCK)
        pool = self._small if size <= SMALL_REQUEST else self._large
        block = pool.best_fit(size) or self._grow(pool, size)
        pool.take(block)
        rest = block.size - size
        if rest >= MIN_BLOCK if pool.small or self.expandable else rest > SMALL_REQUEST:
            pool.put(block.cut(size))
        block.requested = nbytes
        self.requested += nbytes
        self.allocated += block.size
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Take memory back.

        Args:
            block: What `malloc` returned.

        Raises:
            ModeError: It is free already.
        """
        if not block.live:
            raise ModeError(f"the block at {block.address:#x} is free already")
        self.requested -= block.requested
        self.allocated -= block.size
        block.requested = 0
        block.pool.put(block.join())

    def empty_cache(self) -> None:
        """Give back to the device all that no live block holds fast, as ``torch.cuda.empty_cache`` does."""
        for pool in (self._large, self._small):
            for block in [pool.at[address] for _, address in pool.free]:
                if self.expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.take(block)
                    del self._heads[block.address]
                    self._call(SEGMENT_FREE, block.address, block.size)

    def segments(self) -> list[list[Block]]:
        """The blocks of every segment in the order of addresses; of an expandable segment, of every part that is mapped."""
        runs: list[list[Block]] = []
        for address in sorted(self._heads):
            block: Block | None = self._heads[address]
            run: list[Block] = []
            while block is not None:
                if block.mapped:
                    run.append(block)
                if run and (block.next is None or not block.next.mapped):
                    runs.append(run)
                    run = []
                block = block.next
        return runs

    def _grow(self, pool: Pool, size: int) -> Block:
        """A free block of at least ``size`` bytes, shelved, with memory from the device."""
        obtain = self._extend if self.expandable else self._new_segment
        block = obtain(pool, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = obtain(pool, size)
        if block is None:
            raise OutOfMemory(
                f"Out of memory: no room for a request of {readable(size)}. Of the capacity of {readable(self.capacity or 0)}, "
                f"{readable(self.reserved)} are reserved, and of these {readable(self.allocated)} are allocated."
            )
        return block

    def _new_segment(self, pool: Pool, size: int) -> Block | None:
        nbytes = pool.granule if size < OWN_SEGMENT else round_up(size, OWN_SEGMENT_STEP)
        if not self._has(nbytes):
            return None
        block = Block(pool, self._place(nbytes), nbytes)
        self._heads[block.address] = block
        self._call(SEGMENT_ALLOC, block.address, nbytes)
        pool.put(block)
        return block

    def _place(self, nbytes: int) -> int:
        """Where a driver puts a segment, which decides between blocks that fit equally well."""
        for number, (address, size) in enumerate(self._holes):
            if size >= nbytes:
                self._holes[number : number + 1] = [(address + nbytes, size - nbytes)] if size > nbytes else []
                return address
        self._lowest_address -= round_up(nbytes, DRIVER_PIECE)
        if nbytes % DRIVER_PIECE:
            self._holes.insert(0, (self._lowest_address + nbytes, -nbytes % DRIVER_PIECE))
        return self._lowest_address

    def _extend(self, pool: Pool, size: int) -> Block | None:
        block: Block | None = pool.lowest_fit(size)
        while block is not None and not (block.mapped and block.size >= size):
            block = self._map(block.next, size - block.size) if block.mapped else self._map(block, size)
        return block

    def _map(self, hole: Block | None, nbytes: int) -> Block | None:
        """Put memory behind the first bytes of a hole, or all; the free block they are part of is returned, shelved."""
        if hole is None or not self._has(nbytes := round_up(min(nbytes, hole.size), hole.pool.granule)):
            return None
        hole.pool.take(hole)
        if hole.size > nbytes:
            hole.pool.put(hole.cut(nbytes))
        hole.mapped = True
        self._call(SEGMENT_MAP, hole.address, nbytes)
        whole = hole.join()
        whole.pool.put(whole)
        return whole

    def _unmap(self, block: Block) -> None:
        """Give back the granules that lie wholly inside a free block."""
        pool = block.pool
        start = round_up(block.address, pool.granule)
        end = (block.address + block.size) // pool.granule * pool.granule
        if start >= end:
            return
        pool.take(block)
        if start > block.address:
            above = block.cut(start - block.address)
            pool.put(block)
            block = above
        if end < start + block.size:
            pool.put(block.cut(end - start))
        block.mapped = False
        self._call(SEGMENT_UNMAP, start, end - start)
        pool.put(block.join())

    def _has(self, nbytes: int) -> bool:
        return self.capacity is None or self.reserved + nbytes <= self.capacity

    def _call(self, action: str, address: int, size: int) -> None:
        self.calls.append(DeviceCall(action, address, size))
        self.reserved += size if action in (SEGMENT_ALLOC, SEGMENT_MAP) else -size
        self.peak_reserved = max(self.peak_reserved, self.reserved)


@dataclass(frozen=True)
class Replayed:
    """What an allocator made of a log.

    Args:
        requested: Peak of the bytes asked for.
        allocated: Peak of the bytes handed out: what ``torch.cuda.max_memory_allocated`` would report.
        reserved: Peak of the bytes taken from the device: what ``torch.cuda.max_memory_reserved`` would report.
        segments: How often the device was asked for memory and gave it.
        retries: How often it had none left, and the cache was given back.
        fits: Whether the capacity sufficed; where not, the other figures are those up to the failure.
        failure: What did not fit.
    """

    requested: int
    allocated: int
    reserved: int
    segments: int
    retries: int
    fits: bool
    failure: str | None


def replay(log: Log, *, capacity: int | None = None, expandable: bool = False, preload: Sequence[int] = ()) -> Replayed:
    """Put a log's events through the allocator.

    Args:
        log: The log: first what was there before, then what happened.
        capacity: Bytes the device has for it; None for as many as it takes.
        expandable: Whether segments are expandable.
        preload: Bytes of blocks that are there from first to last beside the log, such as the workspaces of kernels.

    Returns:
        The peaks, and whether it fits.
    """
    allocator = CachingAllocator(capacity=capacity, expandable=expandable)
    live: dict[int, Block] = {}
    failure = None
    try:
        for nbytes in preload:
            allocator.malloc(nbytes)
        for index, nbytes, _ in log.events:
            if nbytes > 0:
                live[index] = allocator.malloc(nbytes)
            elif nbytes < 0:
                allocator.free(live.pop(index))
    except OutOfMemory as error:
        failure = str(error)
    peaks = allocator.peak_requested, allocator.peak_allocated, allocator.peak_reserved
    return Replayed(*peaks, allocator.device_allocs, allocator.retries, failure is None, failure)
