"""The allocator's rules, one by one with the numbers they lead to, and what holds after any sequence of requests."""

import random
import re
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingrad.errors import LingradError, ModeError, SpecError
from lingrad.memory.cuda import blocks as rules
from lingrad.memory.cuda.allocator import CachingAllocator, Replayed, replay
from lingrad.memory.cuda.blocks import SPAN, DeviceCall, OutOfMemory, round_up
from lingrad.memory.log import BACKWARD, BEFORE, FORWARD, Log

KIB, MIB = 1 << 10, 1 << 20


def test_the_sizes_are_those_of_the_installed_torch():
    header = Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h"
    found = dict(re.findall(r"constexpr size_t (k\w+) = (\d+);", header.read_text())) if header.exists() else {}
    if not found:
        pytest.skip("this torch brings no header that says")
    ours = {
        "kMinBlockSize": rules.MIN_BLOCK,
        "kSmallSize": rules.SMALL_REQUEST,
        "kSmallBuffer": rules.SMALL_SEGMENT,
        "kMinLargeAlloc": rules.OWN_SEGMENT,
        "kRoundLarge": rules.OWN_SEGMENT_STEP,
    }
    assert {name: int(found[name]) for name in ours} == ours


def reserved_by(nbytes, **options):
    allocator = CachingAllocator(**options)
    allocator.malloc(nbytes)
    return allocator.reserved


def sizes(allocator):
    return [[(block.size, block.live) for block in blocks] for blocks in allocator.segments()]


@pytest.mark.parametrize(
    ("nbytes", "block"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512), (3 * MIB + 5, 3 * MIB + 512)],
)
def test_sizes_are_rounded_up_to_512_bytes(nbytes, block):
    allocator = CachingAllocator()
    assert allocator.malloc(nbytes).size == allocator.allocated == block
    assert allocator.requested == nbytes


@pytest.mark.parametrize(
    ("nbytes", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded first, so it counts as 10 MiB
        (10 * MIB - 1, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (12 * MIB, 12 * MIB),
        (25 * MIB, 26 * MIB),
    ],
)
def test_the_request_decides_the_size_of_the_segment(nbytes, segment):
    assert reserved_by(nbytes) == segment


@pytest.mark.parametrize(
    ("nbytes", "mapped"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB, 20 * MIB), (20 * MIB + 1, 40 * MIB), (65 * MIB, 80 * MIB)],
)
def test_expandable_segments_are_mapped_in_granules(nbytes, mapped):
    assert reserved_by(nbytes, expandable=True) == mapped


def test_requests_of_nothing_and_second_frees_are_refused():
    allocator = CachingAllocator()
    with pytest.raises(SpecError, match="at least 1 byte, not 0"):
        allocator.malloc(0)
    block = allocator.malloc(5)
    allocator.free(block)
    with pytest.raises(ModeError, match="is free already"):
        allocator.free(block)


def test_the_small_pool_splits_off_every_rest():
    allocator = CachingAllocator()
    held = [allocator.malloc(MIB), allocator.malloc(MIB - 512), allocator.malloc(512)]
    assert sizes(allocator) == [[(MIB, True), (MIB - 512, True), (512, True)]]
    allocator.free(held[1])
    assert allocator.malloc(MIB - 1024).size == MIB - 1024
    assert sizes(allocator) == [[(MIB, True), (MIB - 1024, True), (512, False), (512, True)]]


@pytest.mark.parametrize(("rest", "split"), [(512, False), (MIB, False), (MIB + 512, True)])
def test_the_large_pool_splits_off_a_rest_above_1_mib(rest, split):
    allocator = CachingAllocator()
    block = allocator.malloc(14 * MIB - rest)
    assert allocator.reserved == 14 * MIB
    assert block.size == allocator.allocated == (14 * MIB - rest if split else 14 * MIB)
    assert allocator.requested == 14 * MIB - rest


def test_an_expandable_segment_splits_off_every_rest():
    allocator = CachingAllocator(expandable=True)
    assert allocator.malloc(20 * MIB - 512).size == 20 * MIB - 512
    assert sizes(allocator) == [[(20 * MIB - 512, True), (512, False)]]


def test_the_pools_do_not_lend_to_each_other():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(15 * MIB))
    allocator.malloc(512)
    assert allocator.reserved == 18 * MIB
    allocator.malloc(MIB + 512)
    assert allocator.reserved == 18 * MIB


def test_the_smallest_block_that_holds_the_request_is_taken():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(size * MIB) for size in (30, 12, 16, 12)]
    addresses = [block.address for block in blocks]
    for block in blocks:
        allocator.free(block)
    assert addresses[3] < addresses[1]
    # of the two that fit best the lower one, then the other, then the next larger
    for index in (3, 1, 2, 0):
        assert allocator.malloc(11 * MIB + 1).address == addresses[index]
    assert allocator.device_allocs == 4


def test_the_driver_cuts_segments_off_pieces_of_32_mib():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(size * MIB) for size in (20, 34, 30, 1, 12)]
    addresses = [(block.address - SPAN) // MIB for block in blocks]
    # 34 MiB take two pieces and leave 30; 1 MiB comes from a segment of 2, which the first piece has, and then 10 are left
    assert addresses == [-32, -96, -62, -12, -128]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_a_freed_block_is_joined_with_its_free_neighbours(order):
    allocator = CachingAllocator()
    blocks = [allocator.malloc(3 * MIB) for _ in range(4)]
    for index in order:
        allocator.free(blocks[index])
    assert sizes(allocator) == [[(9 * MIB, False), (3 * MIB, True), (8 * MIB, False)]]
    assert allocator.malloc(9 * MIB).address == blocks[0].address


def test_memory_is_used_again_and_segments_are_kept():
    allocator = CachingAllocator()
    for _ in range(5):
        allocator.free(allocator.malloc(40 * MIB))
    assert (allocator.reserved, allocator.allocated, allocator.device_allocs) == (40 * MIB, 0, 1)
    assert allocator.peak_allocated == 40 * MIB
    allocator.empty_cache()
    assert (allocator.reserved, allocator.peak_reserved) == (0, 40 * MIB)
    assert [call.action for call in allocator.calls] == ["segment_alloc", "segment_free"]


def test_at_capacity_empty_segments_are_given_back():
    allocator = CachingAllocator(capacity=60 * MIB)
    large, kept, small = allocator.malloc(30 * MIB), allocator.malloc(3 * MIB), allocator.malloc(512)
    allocator.free(large)
    allocator.free(small)
    allocator.malloc(34 * MIB)
    assert allocator.retries == 1
    assert allocator.reserved == 54 * MIB  # both empty segments are gone, the one with a live block is not
    assert allocator.peak_reserved == 54 * MIB
    assert kept.live


def test_without_room_the_error_says_how_it_stood():
    allocator = CachingAllocator(capacity=60 * MIB)
    allocator.malloc(3 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(41 * MIB - 5)
    assert isinstance(caught.value, LingradError)
    assert str(caught.value) == (
        "Out of memory: no room for a request of 41.00 MiB. "
        "Of the capacity of 60.00 MiB, 20.00 MiB are reserved, and of these 3.00 MiB are allocated."
    )
    assert allocator.retries == 1
    allocator.malloc(40 * MIB)
    assert allocator.reserved == allocator.capacity


def test_an_expandable_segment_grows_by_what_its_end_lacks():
    allocator = CachingAllocator(expandable=True)
    first, second = allocator.malloc(15 * MIB), allocator.malloc(15 * MIB)
    assert second.address == first.address + first.size
    assert allocator.reserved == 40 * MIB
    assert [call.size for call in allocator.calls] == [20 * MIB, 20 * MIB]
    allocator.malloc(31 * MIB)
    assert allocator.reserved == 80 * MIB


def test_the_end_of_an_expandable_segment_is_taken_last():
    allocator = CachingAllocator(expandable=True)
    blocks = [allocator.malloc(12 * MIB), allocator.malloc(2 * MIB)]
    allocator.free(blocks[0])
    # the end has 6 MiB and fits better, but it can grow
    assert allocator.malloc(5 * MIB).address == blocks[0].address


def test_granules_inside_a_free_block_are_given_back():
    allocator = CachingAllocator(expandable=True, capacity=120 * MIB)
    below, middle, above = allocator.malloc(30 * MIB), allocator.malloc(65 * MIB), allocator.malloc(25 * MIB)
    start = below.address
    allocator.free(middle)
    allocator.malloc(MIB)  # the small pool needs a granule, and there is none left
    assert allocator.retries == 1
    # free from 30 to 95 MiB: the granules from 40 to 80 MiB touch no live block
    assert allocator.calls[-2:] == [
        DeviceCall("segment_unmap", start + 40 * MIB, 40 * MIB),
        DeviceCall("segment_map", allocator.segments()[0][0].address, 2 * MIB),
    ]
    assert sizes(allocator)[1:] == [[(30 * MIB, True), (10 * MIB, False)], [(15 * MIB, False), (25 * MIB, True)]]
    # the hole is filled before the segment grows, with as many granules as the request lacks
    hole = allocator.malloc(28 * MIB)
    assert hole.address == start + 30 * MIB
    assert allocator.reserved == 102 * MIB
    allocator.free(above)
    allocator.free(hole)
    allocator.empty_cache()
    assert allocator.reserved == 42 * MIB


def test_a_hole_between_free_blocks_is_mapped_in_full():
    allocator = CachingAllocator(expandable=True)
    below, middle, above = allocator.malloc(30 * MIB), allocator.malloc(65 * MIB), allocator.malloc(25 * MIB)
    allocator.free(middle)
    allocator.empty_cache()
    assert allocator.reserved == 80 * MIB
    again = allocator.malloc(65 * MIB)
    assert (again.address, again.size) == (below.address + below.size, 65 * MIB)
    assert again.next is above
    assert allocator.reserved == 120 * MIB


def test_what_was_mapped_before_a_failure_is_given_back():
    allocator = CachingAllocator(expandable=True, capacity=81 * MIB)
    below, middle, above = (allocator.malloc(20 * MIB) for _ in range(3))
    small = allocator.malloc(512)
    allocator.free(middle)
    allocator.empty_cache()
    allocator.free(above)
    allocator.free(small)
    before = len(allocator.calls)
    # the hole takes the 62nd MiB, the end would take the 82nd; with the small pool's cache gone too there is room for both
    assert allocator.malloc(50 * MIB).address == below.address + 20 * MIB
    assert allocator.retries == 1
    assert [(call.action, call.size // MIB) for call in allocator.calls[before:]] == [
        ("segment_map", 20),
        ("segment_unmap", 40),
        ("segment_unmap", 2),
        ("segment_map", 60),
    ]
    assert allocator.reserved == 80 * MIB


REQUESTS = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, MIB),
    st.integers(MIB - 600, MIB + 600),
    st.integers(MIB, 10 * MIB),
    st.integers(9 * MIB, 70 * MIB),
)
ACTIONS = st.lists(st.one_of(REQUESTS, st.integers(-30, -1)), max_size=60)  # a request, or which live block to free


def play(allocator, actions):
    """Yield the live blocks after every action."""
    live = []
    for action in actions:
        if action > 0:
            with suppress(OutOfMemory):
                live.append(allocator.malloc(action))
        elif live:
            allocator.free(live.pop(action % len(live)))
        yield live


@given(ACTIONS, st.booleans(), st.sampled_from([None, 40 * MIB, 130 * MIB]))
@settings(max_examples=150, deadline=None)
def test_the_books_agree_after_any_sequence(actions, expandable, capacity):
    allocator = CachingAllocator(expandable=expandable, capacity=capacity)
    peaks = (0, 0, 0)
    live = []
    for live in play(allocator, actions):
        segments = allocator.segments()
        for blocks in segments:
            assert blocks[0].previous is None or not blocks[0].previous.mapped
            for below, above in pairwise(blocks):
                assert below.address + below.size == above.address
                assert below.next is above
                assert above.previous is below
                assert below.live or above.live  # free neighbours are joined
        ends = [(blocks[0].address, blocks[-1].address + blocks[-1].size) for blocks in segments]
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert {id(block) for blocks in segments for block in blocks if block.live} == {id(block) for block in live}
        assert allocator.requested == sum(block.requested for block in live)
        assert allocator.allocated == sum(block.size for block in live)
        assert allocator.reserved == sum(end - start for start, end in ends)
        assert allocator.requested <= allocator.allocated <= allocator.reserved <= (capacity or allocator.reserved)
        assert all(block.size % 512 == 0 and block.requested <= block.size for block in live)
        now = (allocator.peak_requested, allocator.peak_allocated, allocator.peak_reserved)
        assert all(peak >= before for peak, before in zip(now, peaks, strict=True))
        peaks = now
    while live:
        allocator.free(live.pop())
    assert all([block.live for block in blocks] == [False] for blocks in allocator.segments())
    allocator.empty_cache()
    assert allocator.requested == allocator.allocated == allocator.reserved == 0
    assert allocator.segments() == []


@given(ACTIONS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_emptying_the_cache_keeps_what_live_blocks_touch_and_no_more(actions, expandable):
    allocator = CachingAllocator(expandable=expandable)
    live = [[], *play(allocator, actions)][-1]
    if expandable:
        granules = {
            (block.pool.small, granule)
            for block in live
            for granule in range(block.address // block.pool.granule, -(-(block.address + block.size) // block.pool.granule))
        }
        held = sum(2 * MIB if small else 20 * MIB for small, _ in granules)
    else:
        held = sum(
            sum(block.size for block in blocks) for blocks in allocator.segments() if any(block.live for block in blocks)
        )
    allocator.empty_cache()
    assert allocator.reserved == held
    for block in live:
        allocator.free(block)
    assert allocator.reserved == held


@given(ACTIONS)
@settings(max_examples=100, deadline=None)
def test_an_expandable_segment_is_no_longer_than_all_requests_end_to_end(actions):
    """It grows only where the free blocks do not suffice, and by no more than the request: by induction over the requests."""
    allocator = CachingAllocator(expandable=True)
    ever = {True: 0, False: 0}
    for action, _ in zip(actions, play(allocator, actions), strict=True):
        size = max(round_up(action, 512), 0)
        ever[size <= MIB] += size
        for blocks in allocator.segments():
            pool = blocks[0].pool
            assert sum(block.size for block in blocks) <= round_up(ever[pool.small], pool.granule)


@given(st.lists(REQUESTS, max_size=30))
@settings(max_examples=60, deadline=None)
def test_without_frees_an_expandable_segment_wastes_less_than_a_granule(requests):
    allocator = CachingAllocator(expandable=True)
    for nbytes in requests:
        allocator.malloc(nbytes)
    rounded = [round_up(nbytes, 512) for nbytes in requests]
    small, large = sum(n for n in rounded if n <= MIB), sum(n for n in rounded if n > MIB)
    assert allocator.reserved == round_up(small, 2 * MIB) + round_up(large, 20 * MIB)


def random_log(seed=0, events=400, largest=12 * MIB):
    log, draw = Log(), random.Random(seed)  # noqa: S311 - no secret depends on it
    live = [log.add(draw.randrange(largest), BEFORE, label="weight") for _ in range(10)]
    while len(log.during) < events:
        if live and draw.random() < 0.45:
            log.free(live.pop(draw.randrange(len(live))), BACKWARD)
        elif live and draw.random() < 0.1:
            log.resize(draw.choice(live), draw.choice([0, draw.randrange(largest)]), FORWARD)
        else:
            live.append(log.add(draw.choice([0, draw.randrange(1, 4 * KIB), draw.randrange(largest)]), FORWARD, "aten::mm"))
    return log


@pytest.mark.parametrize("expandable", [False, True])
def test_a_replay_is_the_calls_made_by_hand(expandable):
    log = random_log()
    assert any(nbytes == 0 for _, nbytes, _ in log.events)
    allocator, live = CachingAllocator(expandable=expandable), {}
    allocator.malloc(8 * MIB)
    for index, nbytes, _ in log.events:
        if nbytes > 0:
            assert index not in live
            live[index] = allocator.malloc(nbytes)
        elif nbytes < 0:
            allocator.free(live.pop(index))
    assert replay(log, expandable=expandable, preload=[8 * MIB]) == Replayed(
        requested=allocator.peak_requested,
        allocated=allocator.peak_allocated,
        reserved=allocator.peak_reserved,
        segments=allocator.device_allocs,
        retries=0,
        fits=True,
        failure=None,
    )


def test_a_replay_requests_what_the_log_says():
    log = random_log(seed=1)
    assert replay(log).requested == max(total for total, _, _ in log.running())


def test_a_replay_says_whether_it_fits():
    log = Log()
    first = log.add(30 * MIB, BEFORE)
    log.free(first, FORWARD)
    log.add(40 * MIB, FORWARD)
    assert replay(log, capacity=70 * MIB) == Replayed(40 * MIB, 40 * MIB, 70 * MIB, 2, 0, True, None)
    assert replay(log, capacity=69 * MIB) == Replayed(40 * MIB, 40 * MIB, 40 * MIB, 2, 1, True, None)
    failed = replay(log, capacity=39 * MIB)
    assert (failed.fits, failed.reserved, failed.retries) == (False, 30 * MIB, 1)
    assert failed.failure is not None
    assert failed.failure.startswith("Out of memory: no room for a request of 40.00 MiB.")
    assert not replay(log, capacity=69 * MIB, preload=[30 * MIB]).fits
    assert replay(Log()) == Replayed(0, 0, 0, 0, 0, True, None)


@pytest.mark.parametrize("expandable", [False, True])
def test_a_hundred_thousand_events_take_a_moment(expandable):
    log = random_log(events=100_000, largest=3 * MIB)
    start = time.process_time()
    replay(log, expandable=expandable)
    assert time.process_time() - start < 5  # less than one second, on a machine that does nothing else
