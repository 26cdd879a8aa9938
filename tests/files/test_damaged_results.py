"""Results, snapshots and indices of others, damaged at random: right, or an error of lingrad's, in 2 s and 200 MB."""

import json
import os
import pickle

import pytest

from lingrad.errors import DataError
from lingrad.files.shards import check_shards
from lingrad.memory.cuda.snapshot import load_snapshot, read_snapshot
from lingrad.research.bundle import pack
from lingrad.research.record import RESULT
from lingrad.research.results import read_results, summarize
from lingrad.research.training import METRICS
from tests.research.test_bundle import results  # noqa: F401 - a fixture
from tests.support.mutations import damaged, damaged_bytes, little_memory, read, rng_of, write_json

MANY = [
    pytest.param(range(20), id="few"),
    pytest.param(range(1_000, 1_600), id="hundreds", marks=pytest.mark.slow),
]


def event(action, address, size):
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": [], "user_metadata": "weights"}


BLOCKS = [
    {"address": 1, "size": 1024, "requested_size": 1000, "state": "active_allocated"},
    {"address": 1025, "size": 1024, "state": "inactive"},
]
SNAPSHOT = {
    "segments": [{"device": 0, "address": 1, "total_size": 2048, "blocks": BLOCKS}],
    "device_traces": [[event("segment_alloc", 1, 2048), event("alloc", 1, 1024), event("alloc", 1025, 512)]],
}


@pytest.mark.parametrize("seeds", MANY)
def test_snapshots(tmp_path, seeds):
    path, count = tmp_path / "snapshot.pickle", 0
    with little_memory():
        for seed in range(seeds.start, seeds.start + 5 * len(seeds)):
            rng = rng_of(seed)
            good = pickle.dumps(SNAPSHOT)
            path.write_bytes(damaged_bytes(good, rng) if seed % 3 == 0 else pickle.dumps(damaged(SNAPSHOT, rng)))
            peak = read(lambda: read_snapshot(load_snapshot(path)))
            if peak is not None:
                count += 1
                assert sum(peak.breakdown.values()) == peak.allocated
                assert all(
                    type(size) is int and size >= 0 for size in (peak.allocated, peak.reserved, *peak.breakdown.values())
                )
    assert count


def run_of(folder, which):
    return next(path for path in sorted(folder.glob(f"runs/*/*/{which}")) if "final-000" in str(path))


@pytest.mark.parametrize("seeds", MANY)
@pytest.mark.parametrize("which", [RESULT, METRICS])
def test_records(results, tmp_path, which, seeds):  # noqa: F811 - the fixture
    path, count = run_of(results, which), 0
    good = path.read_bytes()
    lines = [json.loads(line) for line in good.splitlines()]
    with little_memory():
        for seed in seeds:
            rng = rng_of(seed)
            if seed % 3 == 0:
                path.write_bytes(damaged_bytes(good, rng))
            elif which == RESULT:
                write_json(path, damaged(lines[0], rng))
            else:
                found = damaged(lines, rng)
                path.write_text("".join(f"{json.dumps(line)}\n" for line in found) if isinstance(found, list) else "")
            both = read(lambda: read_results([results]))
            if both is not None:
                count += 1
                assert len(both[1]) == 10
                assert [one.entry.name for one in summarize(*both)] == ["svd", "rows"]
            read(pack, [results], tmp_path / "all.json")
    assert count


@pytest.mark.parametrize("kind", ["pipe", "folder", "loose link"])
@pytest.mark.parametrize("which", [RESULT, METRICS])
def test_records_that_are_no_files(results, tmp_path, which, kind):  # noqa: F811 - the fixture
    """A pipe that nobody writes into is not waited for."""
    path = run_of(results, which)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nothing")
    if kind == "loose link":  # as if there were no file: a run without a curve, or no run
        assert len(read_results([results])[1]) == (10 if which == METRICS else 9)
        return
    for reader in (lambda: read_results([results]), lambda: pack([results], tmp_path / "all.json")):
        with pytest.raises(DataError, match="the record .* is damaged"):
            reader()


@pytest.mark.parametrize(
    "change", [{"folder": 0.5}, {"folder": None}, {"quick": "no"}, {"content": []}, {"digest": 3}], ids=str
)
def test_what_says_which_plan_it_was(results, change):  # noqa: F811 - the fixture
    path = next(results.glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is damaged"):
        read_results([results])


def test_a_run_of_an_entry_that_the_plan_has_not(results):  # noqa: F811 - the fixture
    path = run_of(results, RESULT)
    record = json.loads(path.read_text())
    record["run_info"]["job"]["entry"] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="is damaged .*the plan has no entry 'other'"):
        read_results([results])


def test_an_index_of_shards_that_is_no_file(tmp_path):
    for name in ("missing", "pipe"):
        if name == "pipe":
            os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="cannot read"):
            check_shards(tmp_path / name)
