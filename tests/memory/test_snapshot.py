"""Snapshots: the log in torch's form and back, torch's own viewer, and files that hold more than they should."""

import json
import os
import pickle
from base64 import b64decode

import pytest
from torch.cuda import _memory_viz

from lingrad.errors import DataError
from lingrad.memory.cuda.allocator import replay
from lingrad.memory.cuda.snapshot import Peak, load_snapshot, read_snapshot, to_snapshot, write_snapshot
from lingrad.memory.log import BACKWARD, BEFORE, CATEGORIES, FORWARD, STEP, Log
from tests.memory.test_allocator import MIB, random_log

each_kind = pytest.mark.parametrize("expandable", [False, True], ids=["native", "expandable"])


def training_log():
    """Two steps of something like a layer: every kind of category, a resize and a storage without bytes."""
    log = Log()
    weight = log.add(30 * MIB, BEFORE, label="weight")
    log.add(700, BEFORE)
    for _ in range(2):
        hidden = log.add(5 * MIB, FORWARD, "aten::mm")
        scratch = log.add(3 * MIB, FORWARD, "aten::softmax")
        log.resize(scratch, 6 * MIB, FORWARD)
        log.add(0, FORWARD, "aten::empty")
        log.free(scratch, FORWARD)
        gradient = log.add(weight.nbytes, BACKWARD, "aten::mm", label="gradient")
        log.free(hidden, BACKWARD)
        update = log.add(13 * MIB, STEP, "aten::mul")
        log.free(update, STEP)
        log.free(gradient, STEP)
    return log


LOGS = {"training": training_log(), "random": random_log(seed=3), "empty": Log()}
each_log = pytest.mark.parametrize("log", LOGS.values(), ids=LOGS.keys())


@each_log
@each_kind
@pytest.mark.parametrize("preload", [(), (8 * MIB, 1000)], ids=["", "preload"])
def test_the_peaks_of_a_snapshot_are_those_of_the_replay(log, expandable, preload):
    replayed = replay(log, expandable=expandable, preload=preload)
    peak = read_snapshot(to_snapshot(log, expandable=expandable, preload=preload))
    assert (peak.allocated, peak.reserved) == (replayed.allocated, replayed.reserved)
    assert sum(peak.breakdown.values()) == peak.allocated
    assert peak.breakdown.get("untracked", 0) == sum(-(-nbytes // 512) * 512 for nbytes in preload)
    assert list(peak.breakdown) == [category for category in CATEGORIES if category in peak.breakdown]


def test_the_breakdown_is_that_of_the_peak():
    """The update is the last to come: it is cut from the segment that the activations have left."""
    assert read_snapshot(to_snapshot(training_log(), preload=[MIB])) == Peak(
        allocated=74 * MIB + 1024,
        reserved=(2 + 30 + 20 + 30) * MIB,
        breakdown={"weight": 30 * MIB, "gradient": 30 * MIB, "temporaries: step": 13 * MIB, "other": 1024, "untracked": MIB},
    )


@each_log
@each_kind
def test_torch_opens_it(log, expandable):
    snapshot = to_snapshot(log, expandable=expandable, preload=[1000])
    for html in (
        _memory_viz.trace_plot(snapshot),
        _memory_viz.trace_plot(snapshot, plot_segments=True),
        _memory_viz.segment_plot(snapshot),
    ):
        line = next(line for line in html.splitlines() if "local_files = " in line)
        (file,) = json.loads(line.partition(" = ")[2])
        assert pickle.loads(b64decode(file["base64"])) == snapshot  # noqa: S301 - written by the line above
    replayed = replay(log, expandable=expandable, preload=[1000])
    summary = _memory_viz.segsum(snapshot)
    assert f"segments: {len(snapshot['segments'])}\n" in summary
    assert "entries" in _memory_viz.trace(snapshot)
    for flames in (_memory_viz.memory, _memory_viz.segments):
        lines = flames(snapshot, format_flamegraph=str).splitlines()
        held = sum(int(line.rpartition(" ")[2]) for line in lines)
        assert held == sum(segment["total_size"] for segment in snapshot["segments"])
    assert held <= replayed.reserved
    kept = _memory_viz.trace_plot(snapshot, filter_freed=True)
    assert "snapshot.pickle" in kept


def test_events_are_in_the_words_of_torch():
    log = Log()
    storage = log.add(3 * MIB + 1, FORWARD, "aten::mm")
    log.free(storage, FORWARD)
    trace = to_snapshot(log)["device_traces"][0]
    assert [event["action"] for event in trace] == ["segment_alloc", "alloc", "free_requested", "free_completed"]
    assert [event["size"] for event in trace] == [20 * MIB, 3 * MIB + 1, 3 * MIB + 1, 3 * MIB + 1]
    assert [event["time_us"] for event in trace] == [0, 1, 2, 3]
    assert len({event["addr"] for event in trace}) == 1
    assert all(event["stream"] == 0 for event in trace)
    assert {event["user_metadata"] for event in trace} == {"temporaries: forward"}
    assert trace[1]["block_size"] == 3 * MIB + 512
    assert trace[1]["frames"] == [
        {"name": "aten::mm", "filename": "operator", "line": 0},
        {"name": "temporaries: forward", "filename": "forward", "line": 0},
    ]
    # the viewer colours by category only if some event is of the category "unknown"
    assert [event["category"] for event in trace] == ["unknown", *["temporaries: forward"] * 3]


@each_kind
def test_segments_are_tiled_by_blocks(expandable):
    snapshot = to_snapshot(LOGS["random"], expandable=expandable)
    assert snapshot["segments"]
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
        live = [block for block in segment["blocks"] if block["state"] == "active_allocated"]
        assert segment["allocated_size"] == segment["active_size"] == sum(block["size"] for block in live)
        assert segment["requested_size"] == sum(block["requested_size"] for block in live)
        assert all(block["frames"] and block["category"] in CATEGORIES for block in live)


@each_kind
@pytest.mark.parametrize("part", [0.3, 0.7, 1.0])
def test_a_history_that_begins_late_is_completed_from_the_end(expandable, part):
    """Everything live when the history begins is either live at its end or freed within it."""
    snapshot = to_snapshot(LOGS["random"], expandable=expandable)
    trace = snapshot["device_traces"][0]
    begin = int(len(trace) * part)
    while begin < len(trace) and trace[begin]["action"] == "free_completed":
        begin += 1  # a pair of a request and its completion is not taken apart
    live, reserved, expected = {}, 0, (0, 0)
    for position, event in enumerate([*trace, {"action": "snapshot"}]):
        if position >= begin:
            expected = max(expected[0], sum(live.values())), max(expected[1], reserved)
        if event["action"] == "alloc":
            live[event["addr"]] = event["block_size"]
        elif event["action"] == "free_completed":
            del live[event["addr"]]
        elif event["action"] in ("segment_alloc", "segment_map"):
            reserved += event["size"]
    late = {**snapshot, "device_traces": [trace[begin:]]}
    peak = read_snapshot(late)
    assert (peak.allocated, peak.reserved) == expected
    assert sum(peak.breakdown.values()) == peak.allocated


def real(action, addr, size, **fields):
    return {"action": action, "addr": addr, "size": size, "stream": 0, **fields}


def test_a_snapshot_of_a_run_on_a_gpu_may_lack_fields():
    """Two devices, no categories, no block sizes, blocks without addresses, and frees of what was there before."""
    snapshot = {
        "segments": [
            {
                "device": 1,
                "address": 4096,
                "total_size": 20 * MIB,
                "stream": 0,
                "blocks": [
                    {"size": 4 * MIB, "state": "active_allocated"},  # not split: only 3.5 MiB were asked for
                    {"size": 2 * MIB, "state": "active_pending_free"},
                    {"size": 14 * MIB, "state": "inactive"},
                ],
            },
            {"device": 0, "address": 0, "total_size": 2 * MIB, "blocks": []},
        ],
        "device_traces": [
            [],
            [
                real("free_requested", 4096 + 6 * MIB, 1000),
                real("free_completed", 4096 + 6 * MIB, 1000),
                real("segment_free", 1 << 40, 30 * MIB),
                real("alloc", 4096, 7 * MIB // 2),
                real("alloc", 4096 + 6 * MIB, 100, user_metadata="coords"),
                {"action": "oom", "size": 1 << 50, "device_free": 512},
                real("free_requested", 4096 + 6 * MIB, 100),
                real("free_completed", 4096 + 6 * MIB, 100),
            ],
        ],
    }
    assert read_snapshot(snapshot, device=1) == Peak(
        allocated=6 * MIB + 512, reserved=50 * MIB, breakdown={"coords": 512, "other": 2 * MIB, "untracked": 4 * MIB}
    )
    assert read_snapshot(snapshot) == Peak(0, 2 * MIB, {})
    with pytest.raises(DataError, match="the snapshot has no device 2"):
        read_snapshot(snapshot, device=2)


def test_a_history_without_segments_says_what_it_can():
    trace = [real("segment_free", 0, 20 * MIB), real("free_completed", 64, 512), real("segment_alloc", 0, 2 * MIB)]
    assert read_snapshot({"device_traces": [trace]}) == Peak(512, 20 * MIB, {"other": 512})


@pytest.mark.parametrize("snapshot", [{"device_traces": [[{}]]}, {"segments": [{}]}, {"device_traces": 3}, [], {}])
def test_what_is_no_snapshot_is_refused(snapshot):
    with pytest.raises(DataError):
        read_snapshot(snapshot)


@each_log
def test_a_file_holds_the_snapshot(log, tmp_path):
    path = tmp_path / "run.pickle"
    path.write_bytes(b"old")
    snapshot = to_snapshot(log)
    write_snapshot(snapshot, path)
    assert load_snapshot(path) == load_snapshot(str(path)) == snapshot
    assert [file.name for file in tmp_path.iterdir()] == ["run.pickle"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.pickle"
    write_snapshot({"segments": []}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        write_snapshot({"segments": lambda: None}, path)
    assert load_snapshot(path) == {"segments": []}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pickle"]


class Trap:
    ran = False

    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("held", [Trap(), Trap, complex(1, 2), os.system], ids=["call", "class", "builtin", "function"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_file_that_names_anything_is_refused(held, protocol, tmp_path, monkeypatch):
    path = tmp_path / "trap.pickle"
    path.write_bytes(pickle.dumps({"segments": [held]}, protocol=protocol))
    with pytest.raises(
        DataError, match=r"trap\.pickle is not a memory snapshot of torch: it contains .*numbers, texts and containers only"
    ):
        load_snapshot(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Ran out of input"),
        (b"{}", "is not a memory snapshot"),
        (pickle.dumps({"a": [1] * 99})[:-9], "is not a memory snapshot"),
        (b"\x80\x04\x8c\xff", "is not a memory snapshot"),
        (pickle.dumps([1, 2]), "it contains a list, not a dict"),
    ],
)
def test_a_damaged_file_is_refused(data, message, tmp_path):
    path = tmp_path / "damaged.pickle"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_snapshot(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_snapshot(tmp_path / "none.pickle")
