"""The report of a run's memory, and sizes as people write them."""

import json

import pytest

from lingrad import memory
from lingrad.errors import SpecError
from lingrad.memory.cuda.snapshot import load_snapshot, read_snapshot
from lingrad.memory.log import CATEGORIES, Log
from lingrad.memory.report import summarize
from lingrad.memory.units import parse_bytes, readable
from tests.support.memory import build


class TestReport:
    @pytest.fixture(scope="class")
    def report(self):
        return memory.simulate(build, "svd(rank=16)", "adamw", "adapter", batch=2, length=64, capacity=2**30)

    def test_it_reads_as_a_table(self, report):
        text = str(report)
        for wanted in (
            "simulated on cuda",
            "at the peak",
            "coords gradient",
            "peak by phase",
            "largest at the peak",
            "assumed",
        ):
            assert wanted in text
        table = next(block for block in text.split("\n\n") if "-----" in block).splitlines()
        assert len({len(line) for line in table}) == 1

    def test_json(self, report, tmp_path):
        plain = json.loads(report.to_json(tmp_path / "report.json"))
        assert plain == json.loads((tmp_path / "report.json").read_text())
        assert sum(plain["breakdown"].values()) == plain["peak"] == report.peak
        assert max(sum(point["bytes"].values()) for point in plain["timeline"]) == report.peak
        assert plain["assumptions"]

    def test_peaks_by_step(self, report):
        """The first step's peak is that of a run of one step; the run's peak is that of one of its steps."""
        first, second = report.by_step
        alone = memory.simulate(build, "svd(rank=16)", "adamw", "adapter", batch=2, length=64, steps=1)
        assert first == alone.breakdown
        assert max(sum(first.values()), sum(second.values())) == report.peak
        assert second["moments"] > first.get("moments", 0)
        assert summarize(Log(), source="tracked", device="cpu").by_step == ()

    def test_plot(self, report, tmp_path):
        assert report.plot(tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in report.plot(tmp_path / "run.svg").read_bytes()

    def test_snapshot_opens_in_torchs_own_viewer(self, report, tmp_path):
        from torch.cuda import _memory_viz

        snapshot = load_snapshot(report.to_snapshot(tmp_path / "run.pickle"))
        assert "<html" in _memory_viz.trace_plot(snapshot)
        peak = read_snapshot(snapshot)
        assert peak.allocated == report.allocated or peak.allocated >= report.peak

    def test_nothing_at_all(self):
        report = summarize(Log(), source="tracked", device="cpu")
        assert report.peak == report.steady == 0
        assert "0 B requested at the peak, 0 B between steps" in str(report)

    def test_categories_are_known(self, report):
        assert set(report.breakdown) <= set(CATEGORIES)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5MiB", 3 * 2**19), ("512 B", 512), ("2 tib", 2**41)]
)
def test_sizes_are_read(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "24", "GiB", "-1GiB", "24 parsec", "1e3GiB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(SpecError, match="is not a size in bytes; write a number and a unit, such as 24GiB or 80GB"):
        parse_bytes(text)


def test_a_size_without_end_is_refused():
    with pytest.raises(SpecError, match="is more than any device has"):
        parse_bytes("9" * 400 + "GiB")


def test_sizes_are_written():
    assert [readable(n) for n in (0, 1023, 1024, 3 * 2**30, 5 * 2**41)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "3.00 GiB",
        "10.00 TiB",
    ]
