"""All results of a plan in one file: packed, and unpacked elsewhere."""

import json
import math
from pathlib import Path

import pytest

from lingrad.errors import DataError, SpecError
from lingrad.research import commands
from lingrad.research.bundle import FORMAT, POINTS, pack, unpack
from lingrad.research.execution import PLAN
from lingrad.research.plan import make_plan
from lingrad.research.record import RESULT, make_record
from lingrad.research.results import read_results
from lingrad.research.training import METRICS

CONTENT = {
    "name": "two ways",
    "seeds": [1, 2, 3],
    "task": {"kind": "text", "data": "moby-dick", "steps": 120},
    "search": {"space": {"lr": [1e-3, 2e-3]}},
    "match": {"equal": "state_bytes", "entry": "svd"},
    "entries": [{"name": "svd", "method": "svd(rank=4)"}, {"name": "rows", "method": "rows(rank=4)", "mode": "adapter"}],
}


@pytest.fixture
def results(tmp_path):
    """A folder of results that nothing was trained for: two entries, two trials and three final runs each; one failed."""
    out = tmp_path / "results"
    plan = make_plan(CONTENT, "plan.toml", tmp_path)
    claim = {"digest": plan.digest, "folder": str(tmp_path), "quick": False, "content": CONTENT}
    out.mkdir()
    (out / PLAN).write_text(json.dumps(claim))
    for e, entry in enumerate(plan.entries):
        for part, count in (("tuning", 2), ("final", 3)):
            for number in range(count):
                kind = "final" if part == "final" else "search"
                folder = out / "runs" / f"{entry.name}-0000000{e}" / f"{kind}-{number:03d}"
                folder.mkdir(parents=True)
                job = {**claim, "where": PLAN, "entry": entry.name, "values": {"lr": [1e-3, 2e-3][number % 2]}}
                job |= {"seed": number + 1 if part == "final" else 0, "part": part, "steps": None, "threads": 1}
                job.pop("digest")
                failed = (e, part, number) == (1, "final", 2)
                found = {} if failed else {"metrics": {"loss": 2 + e + 0.1 * number}, "steps": 120, "tokens": 9, "seconds": 1.5}
                found |= {} if failed else {"bytes": {"state": 100 + e}}
                record = make_record(job, found, status="diverged" if failed else "success", error="", created="2026-01-01")
                (folder / RESULT).write_text(json.dumps(record))
                lines = [{"step": i + 1, "loss": math.exp(-i), **({"energy": 0.5} if i % 40 == 7 else {})} for i in range(120)]
                (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_the_report_of_the_file_is_that_of_the_folder(results, tmp_path):
    file, again = tmp_path / "all.json", tmp_path / "again"
    (*_, written) = commands.report_of([results], publish=file)
    assert written == file
    commands.report_of([file], out=again, files=tmp_path)
    assert (again / "report.md").read_text() == (results / "report.md").read_text()
    assert "failures" in (again / "report.html").read_text()
    assert (
        "than svd's, by the largest rank that fits. More, with no rank to set or none small enough: rows."
        in (again / "report.md").read_text()
    )
    assert str(tmp_path) not in file.read_text()  # no folder of a machine is published
    _, runs = read_results([again], tmp_path)
    finals = [run for run in runs if run.final]
    assert all(POINTS <= len(run.curve) <= 2 * POINTS + 4 for run in finals)
    assert finals[0].curve[-1][0] == 120


def test_the_entry_that_others_are_compared_with(results):
    for name, first, other in (("", "svd", "rows"), ("rows", "rows", "svd")):
        commands.report_of([results], versus=name)
        lines = (results / "report.md").read_text().splitlines()
        table = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
        assert table[0][3] == f"less that of {first}"
        assert [row[1] for row in table[2:4]] == [first, other]
        assert [row[3][:2] for row in table[2:4]] == ["", "+1" if first == "svd" else "-1"]
    with pytest.raises(SpecError, match="there is no entry 'row' to compare with; did you mean 'rows'"):
        commands.report_of([results], versus="row")


def test_a_run_that_was_unpacked_is_a_job_again(results, tmp_path):
    unpack(pack([results], tmp_path / "all.json"), tmp_path / "again")
    record = json.loads(next((tmp_path / "again").rglob(RESULT)).read_text())
    assert record["run_info"]["job"]["content"] == CONTENT
    assert record["meta_info"]["package_info"]["torch-version"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [], "holds no published results"),
        (lambda found: {**found, "format": "2"}, f"holds no published results ('format' is not '{FORMAT}')"),
        (lambda found: {**found, "runs": {"../../evil/search-000": found["runs"].popitem()[1]}}, "is no name of a run"),
        (lambda found: {**found, "meta_info": []}, "damaged"),
        (lambda found: {key: found[key] for key in ("format", "meta_info", "runs")}, "damaged"),
    ],
    ids=range(5),
)
def test_a_damaged_file_leaves_nothing(results, tmp_path, change, message):
    file = pack([results], tmp_path / "all.json")
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as caught:
        unpack(file, tmp_path / "again")
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_no_place_of_a_machine_is_published(results, tmp_path):
    path = next(path for path in results.rglob(RESULT) if "diverged" in path.read_text())
    record = json.loads(path.read_text())
    record["run_info"]["error_msg"] = f"{tmp_path}/rows.jsonl, row 1; {results.absolute()}/x; {Path.home()}/y"
    path.write_text(json.dumps(record))
    text = pack([results], tmp_path / "all.json").read_text()
    assert str(tmp_path) not in text
    assert ".../rows.jsonl, row 1; .../x; .../y" in text
    claim = json.loads((results / PLAN).read_text())
    claim["content"]["task"]["data"] = "/home/me/book.txt"
    (results / PLAN).write_text(json.dumps(claim))
    with pytest.raises(DataError, match="the plan names '/home/me/book.txt', a place on this machine; name files relative to"):
        pack([results], tmp_path / "more.json")


def test_a_folder_that_exists_is_not_called_a_damaged_file(results, tmp_path):
    file = pack([results], tmp_path / "all.json")
    with pytest.raises(DataError, match="exists, and nothing is overwritten"):
        unpack(file, results)


def test_a_file_beside_the_report_would_be_taken_for_one_of_it(results):
    with pytest.raises(DataError, match="is in the folder of the results, beside the report; publish into another folder"):
        commands.report_of([results], publish=results / "report.json")


def test_what_cannot_be_published(results, tmp_path):
    with pytest.raises(DataError, match="name a new folder for them and their report, --out FOLDER"):
        commands.report_of([tmp_path / "all.json"])
    with pytest.raises(DataError, match="--out is for published results"):
        commands.report_of([results], out=Path("elsewhere"))
    next(results.rglob(RESULT)).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        pack([results], tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()
