"""A log in the form of ``torch.cuda.memory._snapshot()``, and what such a snapshot says of a run, simulated or real.

A snapshot holds ``device_traces``, per device the events in order, and ``segments``, what the allocator held at the end. Event
sizes are bytes asked for, as torch records them; the bytes of the block behind an event, which torch does not record, stand
beside them as ``block_size``. Categories stand as ``user_metadata``, where a run on a GPU can put them too, and as
``category``, by which torch's viewer colours.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from typing_extensions import override

from lingrad.errors import DataError
from lingrad.files.atomic import write_whole
from lingrad.memory.cuda.allocator import CachingAllocator
from lingrad.memory.cuda.blocks import MIN_BLOCK, Block, round_up
from lingrad.memory.log import BEFORE, CATEGORIES, Log, Storage

Event = Mapping[str, Any]

MADE, GONE = "alloc", "free_completed"
TAKEN, RETURNED = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
LIVE_STATES = "active"  # a state that begins so is live: allocated, or freed while another stream still reads it
FOUND, UNTRACKED = "other", "untracked"  # for what was there before the history, and for what nobody named


class Peak(NamedTuple):
    """The most memory a snapshot's history saw in use.

    Args:
        allocated: Bytes of live blocks, at their peak.
        reserved: Bytes taken from the device, at their own peak.
        breakdown: Category -> bytes when ``allocated`` was at its peak for the first time; they sum to it.
    """

    allocated: int
    reserved: int
    breakdown: dict[str, int]


def to_snapshot(log: Log, *, expandable: bool = False, preload: Sequence[int] = ()) -> dict[str, Any]:
    """What torch would have recorded, had it allocated a log's storages.

    Args:
        log: The log.
        expandable: Whether segments are expandable.
        preload: Bytes of blocks that are there from first to last beside the log, such as the workspaces of kernels.

    Returns:
        The snapshot, of device 0 and stream 0. The time of an event is its number.
    """
    allocator = CachingAllocator(expandable=expandable)
    trace: list[dict[str, Any]] = []
    live: dict[int, tuple[Block, dict[str, Any]]] = {}
    noted = 0

    def note(action: str, address: int, size: int, labels: Event) -> None:
        trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": len(trace), **labels})

    def make(index: int, nbytes: int, labels: dict[str, Any]) -> None:
        nonlocal noted
        block = allocator.malloc(nbytes)
        for call in allocator.calls[noted:]:
            # the viewer needs one event of the category it gives to events without any
            note(*call, labels | {"category": "unknown"})
        noted = len(allocator.calls)
        live[index] = block, labels
        note(MADE, block.address, nbytes, labels | {"block_size": block.size})

    for number, nbytes in enumerate(preload):
        make(-1 - number, nbytes, _labels(Storage(-1 - number, nbytes, BEFORE, "", UNTRACKED)))
    named = [_labels(storage) for storage in log.storages]
    for index, nbytes, _ in log.events:
        if nbytes > 0:
            make(index, nbytes, named[index])
        elif nbytes < 0:
            block, labels = live.pop(index)
            for action in ("free_requested", GONE):
                note(action, block.address, block.requested, labels | {"block_size": block.size})
            allocator.free(block)
    labels_at = {block.address: labels for block, labels in live.values()}
    return {
        "segments": [_segment(blocks, labels_at, expandable) for blocks in allocator.segments()],
        "device_traces": [trace],
        "allocator_settings": {"expandable_segments": expandable},
        "external_annotations": [],
    }


def _labels(storage: Storage) -> dict[str, Any]:
    """What events and blocks say of a storage; the innermost frame first, as in a stack trace."""
    frames = [{"name": storage.category, "filename": storage.phase, "line": storage.index}]
    if storage.op:
        frames.insert(0, {"name": storage.op, "filename": "operator", "line": 0})
    return {"frames": frames, "user_metadata": storage.category, "category": storage.category}


def _segment(blocks: list[Block], labels_at: Mapping[int, Event], expandable: bool) -> dict[str, Any]:
    described = [
        {
            "address": block.address,
            "size": block.size,
            "requested_size": block.requested,
            "state": "active_allocated" if block.live else "inactive",
            "frames": [],
            **labels_at.get(block.address, {}),
        }
        for block in blocks
    ]
    allocated = sum(block.size for block in blocks if block.live)
    return {
        "device": 0,
        "address": blocks[0].address,
        "total_size": sum(block.size for block in blocks),
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block.requested for block in blocks),
        "stream": 0,
        "segment_type": "small" if blocks[0].pool.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": expandable,
        "frames": [],
        "blocks": described,
    }


def read_snapshot(snapshot: Mapping[str, Any], device: int = 0) -> Peak:
    """The peaks of a snapshot.

    The history may begin in the middle of a run: what was live then is found backwards, from what was live at the end. A
    block counts until its free is completed. Where the size of a block is not known, it is the size asked for, rounded as the
    allocator rounds; blocks it chose not to split are larger.

    Args:
        snapshot: What ``torch.cuda.memory._snapshot()`` returned, `to_snapshot` or `load_snapshot`.
        device: The device's number.

    Returns:
        The peaks. A block without a category counts as ``untracked``, or as ``other`` where it was there before the history.

    Raises:
        DataError: It is no snapshot, lacks what cannot be inferred, or does not know the device.
    """
    try:
        traces = snapshot.get("device_traces", ())
        trace = traces[device] if device < len(traces) else ()
        segments = [segment for segment in snapshot.get("segments", ()) if segment.get("device", 0) == device]
        if device >= len(traces) and not segments:
            raise DataError(f"the snapshot says nothing of device {device}")
        allocated, breakdown = _peak_of_blocks(trace, segments)
        return Peak(allocated, _peak_reserved(trace, segments), breakdown)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"this is not a memory snapshot of torch: {type(error).__name__}: {error}") from error


def _peak_of_blocks(trace: Sequence[Event], segments: Iterable[Event]) -> tuple[int, dict[str, int]]:
    live = dict(_live_blocks(segments))
    sizes: dict[int, int] = {}  # by the position of the event that made a block
    for position in range(len(trace) - 1, -1, -1):
        event = trace[position]
        if event["action"] == MADE:
            sizes[position] = live.pop(event["addr"], (_block_size(event), ""))[0]
        elif event["action"] == GONE:
            live[event["addr"]] = _block_size(event), FOUND
    by_category: Counter[str] = Counter()
    for size, category in live.values():
        by_category[category] += size
    total = by_category.total()
    peak, at_peak = total, dict(by_category)
    for position, event in enumerate(trace):
        if event["action"] == MADE:
            size, category = sizes[position], _category(event, UNTRACKED)
            live[event["addr"]] = size, category
            by_category[category] += size
            total += size
            if total > peak:
                peak, at_peak = total, dict(by_category)
        elif event["action"] == GONE and event["addr"] in live:
            size, category = live.pop(event["addr"])
            by_category[category] -= size
            total -= size
    order = {category: place for place, category in enumerate(CATEGORIES)}
    found = sorted(at_peak.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    return peak, {category: size for category, size in found if size}


def _peak_reserved(trace: Iterable[Event], segments: Sequence[Event]) -> int:
    gained, lowest, highest = 0, 0, 0
    for event in trace:
        if event["action"] in TAKEN:
            gained += int(event["size"])
        elif event["action"] in RETURNED:
            gained -= int(event["size"])
        lowest, highest = min(lowest, gained), max(highest, gained)
    before = sum(int(segment["total_size"]) for segment in segments) - gained
    # without the segments of the end, the history alone says how much there must have been
    return max(before, -lowest) + highest


def _live_blocks(segments: Iterable[Event]) -> Iterable[tuple[int, tuple[int, str]]]:
    for segment in segments:
        address = segment["address"]
        for block in segment.get("blocks", ()):
            if block["state"].startswith(LIVE_STATES):
                # older snapshots do not say where a block begins; blocks leave no gaps
                yield block.get("address", address), (block["size"], _category(block, FOUND))
            address += block["size"]


def _block_size(event: Event) -> int:
    return int(event.get("block_size") or round_up(event["size"], MIN_BLOCK))


def _category(event: Event, default: str) -> str:
    return str(event.get("user_metadata") or event.get("category") or default)


def write_snapshot(snapshot: Mapping[str, Any], path: str | Path) -> None:
    """Write a snapshot for pytorch.org/memory_viz, whole or not at all.

    Args:
        snapshot: The snapshot.
        path: The file; replaced if it is there.
    """
    write_whole(Path(path), pickle.dumps(dict(snapshot)))


class _Plain(pickle.Unpickler):  # noqa: S301 - it refuses all that could run code
    """Reads numbers, strings, bytes and builtin containers; whatever else a pickle names is refused, not looked up."""

    @override
    def find_class(self, module: str, name: str, /) -> Any:
        raise DataError(f"it holds a {module}.{name}, and a snapshot holds plain values only")


def load_snapshot(path: str | Path) -> dict[str, Any]:
    """Read a snapshot that torch or `write_snapshot` pickled, without running anything the file asks for.

    Args:
        path: The file.

    Returns:
        The snapshot.

    Raises:
        DataError: The file is damaged, or holds other things than plain values.
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file:
        found = _read(file, path)
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a memory snapshot of torch: it holds a {type(found).__name__}, not a dict")
    return found


def _read(file: IO[bytes], path: str | Path) -> object:
    try:
        return _Plain(file).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is not a memory snapshot of torch: {error}") from error
