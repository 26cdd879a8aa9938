"""A model of PyTorch's CUDA caching allocator, for one stream.

The rules are those of ``c10::cuda::CUDACachingAllocator`` with its default settings. Sizes are rounded up to 512 B. Requests
of at most 1 MiB use the small pool, others the large pool. A request gets the smallest free block of its pool that is large
enough; among equal ones, that at the lowest address. A remainder that is large enough is split off as a new block; a freed
block is merged with its free neighbours. If no block fits, a segment is requested from the device. Empty segments are cached;
they are returned only when the device has no memory left.

With ``expandable`` (``expandable_segments:True``) each pool has one segment that grows: its address range is larger than any
device, and memory is mapped to it in granules of 2 MiB (small pool) or 20 MiB (large pool). Every granule that no live block
overlaps can be returned.

Not modelled, because they do nothing in the default settings: ``max_split_size``, and the garbage collection of the allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lingrad.errors import ModeError, SpecError
from lingrad.memory.cuda.blocks import (
    DRIVER_CHUNK,
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
        capacity: Bytes of memory of the device; None for no limit.
        expandable: Whether segments are expandable.

    Attributes:
        requested: Bytes of the live blocks as requested.
        allocated: Bytes of the live blocks: what ``torch.cuda.memory_allocated`` reports.
        reserved: Bytes taken from the device: what ``torch.cuda.memory_reserved`` reports.
        peak_requested: Peak of ``requested``.
        peak_allocated: Peak of ``allocated``.
        peak_reserved: Peak of ``reserved``.
        retries: How often the device had no memory left and the cache was emptied: torch's ``num_alloc_retries``.
        calls: All calls to the device, in order.
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
        self._holes: list[tuple[int, int]] = []  # (address, size): room left in the driver's chunks
        if expandable:
            for start, pool in ((SPAN, self._small), (2 * SPAN, self._large)):
                self._heads[start] = Block(pool, start, SPAN, mapped=False)
                pool.put(self._heads[start])

    @property
    def device_allocs(self) -> int:
        """Calls of cudaMalloc, or mappings into an expandable segment: torch's ``num_device_alloc``."""
        return sum(call.action in (SEGMENT_ALLOC, SEGMENT_MAP) for call in self.calls)

    def malloc(self, nbytes: int) -> Block:
        """Allocate a block.

        Args:
            nbytes: Bytes; at least 1, since torch does not allocate empty storages.

        Returns:
            The block.

        Raises:
            SpecError: ``nbytes`` is less than 1.
            OutOfMemory: The capacity is too small. Earlier blocks stay allocated.
        """
        if nbytes < 1:
            raise SpecError(f"a block has at least 1 byte, not {nbytes}", option="nbytes")
        size = round_up(nbytes, MIN_BLOCK)
        pool = self._small if size <= SMALL_REQUEST else self._large
        block = pool.best_fit(size) or self._grow(pool, size)
        pool.take(block)
        remainder = block.size - size
        if remainder >= MIN_BLOCK if pool.small or self.expandable else remainder > SMALL_REQUEST:
            pool.put(block.cut(size))
        block.requested = nbytes
        self.requested += nbytes
        self.allocated += block.size
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Free a block.

        Args:
            block: A block that `malloc` returned.

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
        """Return to the device all memory that no live block needs, as ``torch.cuda.empty_cache`` does."""
        for pool in (self._large, self._small):
            for block in [pool.at[address] for _, address in pool.free]:
                if self.expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.take(block)
                    del self._heads[block.address]
                    self._call(SEGMENT_FREE, block.address, block.size)

    def segments(self) -> list[list[Block]]:
        """The blocks of every segment by address; an expandable segment counts as one for each contiguous mapped part."""
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
        """A free block of at least ``size`` bytes, in the pool, with new memory from the device."""
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
        block = Block(pool, self._address_for(nbytes), nbytes)
        self._heads[block.address] = block
        self._call(SEGMENT_ALLOC, block.address, nbytes)
        pool.put(block)
        return block

    def _address_for(self, nbytes: int) -> int:
        """The address at which the driver puts a segment; it decides between free blocks of one size."""
        for number, (address, size) in enumerate(self._holes):
            if size >= nbytes:
                self._holes[number : number + 1] = [(address + nbytes, size - nbytes)] if size > nbytes else []
                return address
        self._lowest_address -= round_up(nbytes, DRIVER_CHUNK)
        if nbytes % DRIVER_CHUNK:
            self._holes.insert(0, (self._lowest_address + nbytes, -nbytes % DRIVER_CHUNK))
        return self._lowest_address

    def _extend(self, pool: Pool, size: int) -> Block | None:
        block: Block | None = pool.lowest_fit(size)
        while block is not None and not (block.mapped and block.size >= size):
            block = self._map(block.next, size - block.size) if block.mapped else self._map(block, size)
        return block

    def _map(self, hole: Block | None, nbytes: int) -> Block | None:
        """Map memory to the first bytes of a hole, or to all of it; returns the free block with these bytes, in the pool."""
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
        """Return the granules that lie entirely inside a free block."""
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
    """The result of replaying a log through the allocator.

    Args:
        requested: Peak of the bytes requested.
        allocated: Peak of the bytes of live blocks: what ``torch.cuda.max_memory_allocated`` would report.
        reserved: Peak of the bytes taken from the device: what ``torch.cuda.max_memory_reserved`` would report.
        segments: How often the device gave memory.
        retries: How often it had none left and the cache was emptied.
        fits: Whether the capacity is large enough; if not, the other figures are those up to the failure.
        failure: The message of the request that did not fit; None if all did.
    """

    requested: int
    allocated: int
    reserved: int
    segments: int
    retries: int
    fits: bool
    failure: str | None


def replay(log: Log, *, capacity: int | None = None, expandable: bool = False, preload: Sequence[int] = ()) -> Replayed:
    """Replay a log's events through the allocator.

    Args:
        log: The log.
        capacity: Bytes of memory of the device; None for no limit.
        expandable: Whether segments are expandable.
        preload: Bytes of blocks that are not in the log and live throughout, such as the workspaces of kernels.

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
