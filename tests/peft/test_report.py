"""The report of an adapter: one schema for all writers, and a reader that refuses what does not fit it."""

import json
import re
from dataclasses import replace

import pytest
import torch

from lingrad import convert
from lingrad import peft as bridge
from lingrad.errors import DataError
from lingrad.peft.report import FILE, VERSION, AdapterReport, ChangedTensor, OutputComparison
from tests.support.peft_runs import llama_run

# The schema of version 1. A change here is a change of the version.
KEYS = {
    "version", "source", "rows", "residual", "nbytes", "saved_modules", "alongside", "start", "outputs", "equal", "model_bytes",
    "goal", "notes",
}  # fmt: skip
ROW_KEYS = {
    "name", "kind", "shape", "nbytes", "rank", "residual", "without_decay", "decay", "change", "floor", "full_rank",
}  # fmt: skip
OUTPUT_KEYS = {"inputs", "difference", "largest", "change"}

ROWS = (
    ChangedTensor("a.0.weight", "low_rank", (4, 6), 160, rank=2, residual=0.5, without_decay=1e-7, decay=0.9, floor=1e-8),
    ChangedTensor("a.1.weight", "low_rank", (4, 6), 240, rank=3, residual=0.25, change=0.125, full_rank=True),
    ChangedTensor("norm.weight", "full", (6,), 24),
)
FULL = AdapterReport(
    "models", ROWS, 0.4, 424, ("norm",), ("a.0.bias", "a.1.bias"), "base", OutputComparison("tokens", 1e-3, 2.0, 0.5), 7, 1000,
    "rank 3", ("a note",), "folder",
)  # fmt: skip
LEAST = AdapterReport("checkpoint", (), 0.0, 0)


class TestSchema:
    def test_its_keys(self):
        found = json.loads(FULL.json())
        assert found.keys() == KEYS
        assert {key for row in found["rows"] for key in row} == ROW_KEYS
        assert found["outputs"].keys() == OUTPUT_KEYS
        assert found["version"] == VERSION == 1
        assert json.loads(LEAST.json()).keys() == KEYS - {"start", "outputs", "equal", "model_bytes", "goal"}  # not known

    @pytest.mark.parametrize("report", [FULL, LEAST], ids=["full", "least"])
    def test_what_is_written_is_read(self, report, tmp_path):
        report.write(tmp_path)
        assert AdapterReport.read(tmp_path) == replace(report, path=str(tmp_path))
        assert AdapterReport.read(tmp_path).json() == report.json()

    @pytest.mark.parametrize("writer", ["run", "models", "checkpoint"])
    def test_every_writer_writes_it(self, writer, tmp_path):
        model, opt = llama_run(dtype=torch.float32, self_contained=True)
        from tests.support.models import llama

        llama(torch.float32).save_pretrained(tmp_path / "base")
        model.save_pretrained(tmp_path / "run", state_dict=model.state_dict())
        torch.save(opt.state_dict(), tmp_path / "run/optimizer.pt")
        out = tmp_path / "out"
        if writer == "run":
            report = bridge.export(opt, out, start=tmp_path / "base", quiet=True)
        elif writer == "models":
            report = convert.convert(tmp_path / "base", tmp_path / "run", out, logits=True)
        else:
            report = convert.convert_run(tmp_path / "run", out, start=tmp_path / "base")
        assert AdapterReport.read(out) == report
        assert (report.source, report.path) == (writer, str(out))
        found = json.loads((out / FILE).read_text())
        assert found.keys() <= KEYS
        assert {key for row in found["rows"] for key in row} <= ROW_KEYS
        assert {row.name for row in report.rows} == set(opt.weights())
        assert report.nbytes == (out / "adapter_model.safetensors").stat().st_size
        assert sum(row.nbytes for row in report.rows) < report.nbytes
        assert report.residual <= report.largest_residual <= 1e-5
        assert str(tmp_path / "base") in report.start
        assert re.search(r"^model.layers.\*.mlp.up_proj.weight \(x 2\) +88 x 32 +8 ", report.table(), flags=re.MULTILINE)
        assert str(report).splitlines()[-1] == f"written: {out} ({report.nbytes / 1e6:,.2f} MB)"


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        FULL.write(tmp_path)
        return tmp_path / FILE

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.pop("version"), "has version None; this lingrad reads version 1"),
            (lambda r: r.update(version=2), "has version 2; this lingrad reads version 1"),
            (lambda r: r.update(version=True), "has version True"),
            (lambda r: r.pop("rows"), "the report has no 'rows'"),
            (lambda r: r.update(extra=1), "the report has the unknown key 'extra'"),
            (
                lambda r: r.update(source="elsewhere"),
                "'source' of the report must be one of run, models, checkpoint, not 'else",
            ),
            (lambda r: r.update(nbytes="many"), "'nbytes' of the report must be of type int, not 'many'"),
            (lambda r: r.update(nbytes=True), "'nbytes' of the report must be of type int, not True"),
            (lambda r: r.update(residual=None), "'residual' of the report must be of type float, not None"),
            (lambda r: r.update(notes="one"), "'notes' of the report must be a list, not 'one'"),
            (lambda r: r.update(notes=[1]), "item 0 of 'notes' of the report must be of type str, not 1"),
            (lambda r: r.update(outputs=[]), r"'outputs' of the report must be an object, not \[\]"),
            (lambda r: r["outputs"].pop("largest"), "'outputs' of the report has no 'largest'"),
            (lambda r: r["rows"][1].pop("shape"), "item 1 of 'rows' of the report has no 'shape'"),
            (lambda r: r["rows"][1].update(rank=2.5), "'rank' of item 1 of 'rows' of the report must be of type int, not 2.5"),
            (lambda r: r["rows"][2].update(kind=[]), "'kind' of item 2 of 'rows' of the report must be one of low_rank, full"),
        ],
    )
    def test_of_a_value(self, path, change, message):
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
        with pytest.raises(DataError, match=message):
            AdapterReport.read(path.parent)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("", "is not JSON"), ("[]", "has version None"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")],
    )
    def test_of_the_file(self, path, text, message):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            AdapterReport.read(path.parent)

    def test_no_report(self, tmp_path):
        with pytest.raises(
            DataError, match="cannot read .*lingrad_report.json: No such file .*expected the folder of an adapter"
        ):
            AdapterReport.read(tmp_path)


class TestTable:
    def test_tensors_that_differ_in_the_layer_share_a_line(self):
        lines = FULL.table().splitlines()
        assert re.split(r"  +", lines[0]) == [
            "tensor", "shape", "rank", "kB", "change", "decay", "residual", "without decay", "rounding",
        ]  # fmt: skip
        assert re.split(r"  +", lines[1]) == [
            "a.*.weight (x 2)", "4 x 6", "2 to 3", "0.4", "1.2e-01", "0.9 to 1", "5.0e-01", "1.0e-07", "1.0e-08",
        ]  # fmt: skip
        assert re.split(r"  +", lines[2]) == ["norm.weight", "6", "full", "0.0", "0", "0"]
        assert lines[3:] == [
            "3 tensors changed, 7 did not; residual of all low-rank changes 4.0e-01; 424 bytes (rank 3)",
            "modules saved in full: norm",
            "saved alongside the adapters: a.*.bias",
            "compared with: base",
            "outputs on tokens: through PEFT they differ by at most 1.0e-03, the largest is 2.0; the adapter changes them by "
            "up to 5.0e-01",
            "note: a note",
        ]
        assert str(FULL) == f"{FULL.table()}\nwritten: folder (0.00 MB)"

    def test_what_is_not_known_has_no_column(self):
        rows = (ChangedTensor("a", "low_rank", (4, 6), 160, rank=2),)
        table = AdapterReport("run", rows, 0.0, 160).table()
        assert table.splitlines()[0].split() == ["tensor", "shape", "rank", "kB", "residual"]
        assert table.splitlines()[-1] == "outputs: not compared; pass inputs= to have them compared"
