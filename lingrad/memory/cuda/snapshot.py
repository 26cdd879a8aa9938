"""Write a log in the format of ``torch.cuda.memory._snapshot()``, and read the peaks of such snapshots, simulated or real.

A snapshot has ``device_traces``, the events of each device in order, and ``segments``, the allocator's state at the end. Event
sizes are bytes requested, as torch records them. The size of the block behind an event, which torch does not record, is added
as ``block_size``. Categories are stored as ``user_metadata``, which a run on a GPU can set too, and as ``category``, by which
torch's viewer chooses colours.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from typing_extensions import override

from lingrad.errors import DataError, shown
from lingrad.files.atomic import write_whole
from lingrad.files.reading import open_plain
from lingrad.memory.cuda.allocator import CachingAllocator
from lingrad.memory.cuda.blocks import MIN_BLOCK, Block, round_up
from lingrad.memory.log import BEFORE, CATEGORIES, Log, Storage

Event = Mapping[str, Any]

MADE, GONE = "alloc", "free_completed"
TAKEN, RETURNED = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
LIVE_STATES = "active"  # prefix of the states that are live: allocated, or freed while another stream still reads the block
FOUND, UNTRACKED = "other", "untracked"  # existed before the history began; no category known


class Peak(NamedTuple):
    """The peaks of a snapshot's history.

    Args:
        allocated: Peak of the bytes of live blocks.
        reserved: Peak of the bytes taken from the device; it may be at another moment.
        breakdown: Category -> bytes at the first peak of ``allocated``; sums to it.
    """

    allocated: int
    reserved: int
    breakdown: dict[str, int]


def to_snapshot(log: Log, *, expandable: bool = False, preload: Sequence[int] = ()) -> dict[str, Any]:
    """The snapshot that torch would have recorded if it had allocated a log's storages.

    Args:
        log: The log.
        expandable: Whether segments are expandable.
        preload: Bytes of blocks that are not in the log and live throughout, such as the workspaces of kernels.

    Returns:
        The snapshot, of device 0 and stream 0. The time of an event is its number.
    """
    allocator = CachingAllocator(expandable=expandable)
    trace: list[dict[str, Any]] = []
    live: dict[int, tuple[Block, dict[str, Any]]] = {}
    recorded = 0  # calls to the device

    def record(action: str, address: int, size: int, labels: Event) -> None:
        trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": len(trace), **labels})

    def make(index: int, nbytes: int, labels: dict[str, Any]) -> None:
        nonlocal recorded
        block = allocator.malloc(nbytes)
        for call in allocator.calls[recorded:]:
            # the viewer needs at least one event of its default category
            record(*call, labels | {"category": "unknown"})
        recorded = len(allocator.calls)
        live[index] = block, labels
        record(MADE, block.address, nbytes, labels | {"block_size": block.size})

    for number, nbytes in enumerate(preload):
        make(-1 - number, nbytes, _labels(Storage(-1 - number, nbytes, BEFORE, "", UNTRACKED)))
    named = [_labels(storage) for storage in log.storages]
    for index, nbytes, _ in log.events:
        if nbytes > 0:
            make(index, nbytes, named[index])
        elif nbytes < 0:
            block, labels = live.pop(index)
            for action in ("free_requested", GONE):
                record(action, block.address, block.requested, labels | {"block_size": block.size})
            allocator.free(block)
    labels_at = {block.address: labels for block, labels in live.values()}
    return {
        "segments": [_segment(blocks, labels_at, expandable) for blocks in allocator.segments()],
        "device_traces": [trace],
        "allocator_settings": {"expandable_segments": expandable},
        "external_annotations": [],
    }


def _labels(storage: Storage) -> dict[str, Any]:
    """The labels of a storage in events and blocks; the innermost frame first, as in a stack trace."""
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

    The history may begin in the middle of a run; what was live then is found backwards, from what is live at the end. A block
    counts until its free is completed. If the size of a block is not known, the requested size is rounded up as the allocator
    rounds it; a block that was not split may be larger.

    Args:
        snapshot: The result of ``torch.cuda.memory._snapshot()``, `to_snapshot` or `load_snapshot`.
        device: The number of the device.

    Returns:
        The peaks. A block without a category counts as ``untracked``, or as ``other`` if it is older than the history.

    Raises:
        DataError: It is not a snapshot, is incomplete, or has no such device.
    """
    try:
        traces = snapshot.get("device_traces", ())
        trace = traces[device] if device < len(traces) else ()
        segments = [segment for segment in snapshot.get("segments", ()) if segment.get("device", 0) == device]
        if device >= len(traces) and not segments:
            raise DataError(f"the snapshot has no device {device}")
        allocated, breakdown = _peak_of_blocks(trace, segments)
        return Peak(allocated, _peak_reserved(trace, segments), breakdown)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"this is not a memory snapshot of torch: {type(error).__name__}: {error}") from error


def _peak_of_blocks(trace: Sequence[Event], segments: Iterable[Event]) -> tuple[int, dict[str, int]]:
    live = dict(_live_blocks(segments))
    sizes: dict[int, int] = {}  # by the position of the event that allocated a block
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
    order = {category: position for position, category in enumerate(CATEGORIES)}
    found = sorted(at_peak.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
    return peak, {category: size for category, size in found if size}


def _peak_reserved(trace: Iterable[Event], segments: Sequence[Event]) -> int:
    gained, lowest, highest = 0, 0, 0
    for event in trace:
        if event["action"] in TAKEN:
            gained += _count(event["size"])
        elif event["action"] in RETURNED:
            gained -= _count(event["size"])
        lowest, highest = min(lowest, gained), max(highest, gained)
    before = sum(_count(segment["total_size"]) for segment in segments) - gained
    # without the final segments, the history alone says how much there must have been
    return max(before, -lowest) + highest


def _live_blocks(segments: Iterable[Event]) -> Iterable[tuple[int, tuple[int, str]]]:
    for segment in segments:
        address = segment["address"]
        for block in segment.get("blocks", ()):
            if block["state"].startswith(LIVE_STATES):
                # older snapshots have no addresses of blocks; blocks leave no gaps
                yield block.get("address", address), (_count(block["size"]), _category(block, FOUND))
            address += block["size"]


def _block_size(event: Event) -> int:
    return _count(event.get("block_size") or round_up(_count(event["size"]), MIN_BLOCK))


def _count(value: Any) -> int:
    """A number of bytes."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"{shown(value)} where a number of bytes was expected")
    return value


def _category(event: Event, default: str) -> str:
    return str(event.get("user_metadata") or event.get("category") or default)


def write_snapshot(snapshot: Mapping[str, Any], path: str | Path) -> None:
    """Write a snapshot for pytorch.org/memory_viz, atomically.

    Args:
        snapshot: The snapshot.
        path: The file; replaced if it exists.
    """
    write_whole(Path(path), pickle.dumps(dict(snapshot)))


class _InertUnpickler(pickle.Unpickler):  # noqa: S301 - it refuses everything that could run code
    """Reads numbers, strings, bytes and builtin containers. Any class or function that the file names is refused."""

    @override
    def find_class(self, module: str, name: str, /) -> Any:
        raise DataError(f"it contains {module}.{name}; a snapshot contains numbers, texts and containers only")


def load_snapshot(path: str | Path) -> dict[str, Any]:
    """Read a snapshot pickled by torch or `write_snapshot`, without running any code that the file names.

    Args:
        path: The file.

    Returns:
        The snapshot.

    Raises:
        DataError: The file is damaged, or contains more than numbers, texts and containers.
        OSError: It cannot be read.
    """
    with open_plain(path) as file:
        found = _read(file, path)
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a memory snapshot of torch: it contains a {type(found).__name__}, not a dict")
    return found


def _read(file: IO[bytes], path: str | Path) -> object:
    try:
        return _InertUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise any exception
        raise DataError(f"{path} is not a memory snapshot of torch: {error}") from error
