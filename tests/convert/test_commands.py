"""`lingrad convert`, `export` and `merge` as typed: what is printed, messages, exit codes; runs of lingrad's own Trainer."""

import json
import sys

import pytest
import torch

import lingrad as lingrad_
from lingrad import convert
from tests.support.folders import contents, make
from tests.support.models import llama, text_batches, train
from tests.support.trainers import make as make_trainer

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)


def test_what_is_printed_is_the_report(lingrad, tmp_path):
    base, tuned = make(tmp_path)
    status, out, _ = lingrad("convert", base, tuned, "--out", tmp_path / "out", "--rank", 3, "--allow-residual", 1)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["tensor", "shape", "rank", "kB", "residual", "rounding"]
    assert lines[-1] == f"Written: {tmp_path / 'out'}"
    report = convert.convert(base, tuned, tmp_path / "again", rank=3, allow_residual=1)
    assert "\n".join(lines[:-1]) == report.table()
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    status, out, _ = lingrad("merge", base, tmp_path / "out", "--out", tmp_path / "merged")
    assert (status, out) == (0, f"Written: {tmp_path / 'merged'}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "START", "TUNED"], "Error: Missing option '--out'"),
        (["convert", "START", "--out", "x"], "Error: Missing argument 'TUNED'"),
        (["convert", "START", "TUNED", "--out", "TUNED"], "lingrad: 'TUNED' exists, and nothing is overwritten"),
        (["convert", "START", "NONE", "--out", "x"], "lingrad: 'NONE' is not a model folder: there is no such folder"),
        (["convert", "START", "TUNED", "--out", "x", "--energy", "2"], "lingrad: energy must lie between 0 and 1, not 2.0"),
        (["convert", "START", "TUNED", "--out", "x", "--rank", "0"], "lingrad: rank must be a whole number, at least 1, not 0"),
        (["convert", "START", "TUNED", "--out", "x", "--dtype", "int4"], "lingrad: dtype must be one of fp32, "),
        (["convert", "START", "TUNED", "--out", "START/config.json/x"], "lingrad: cannot write 'START/config.json/x': "),
        (["convert", "START", "TUNED", "--out", "x", "--json", "none/x"], "lingrad: cannot write none/x: there is no folder"),
        (["export", "TUNED", "--out", "x"], "lingrad: there is no 'TUNED/optimizer.pt'"),
        (["export", "TUNED", "--out", "x", "--energy", "0.9"], "Error: No such option: --energy"),
        (["export", "TUNED", "--out", "x", "--max-error", "0"], "Error: No such option: --max-error"),
        (["export", "TUNED", "--out", "x", "--full-svd"], "Error: No such option: --full-svd"),
        (["convert", "TUNED", "--out", "x", "--exact", "--energy", "0.9"], "Error: No such option: --energy"),
    ],
)
def test_errors_are_one_message_and_status_2(lingrad, tmp_path, monkeypatch, arguments, message):
    base, tuned = make(tmp_path)
    base.rename(tmp_path / "START")
    tuned.rename(tmp_path / "TUNED")
    monkeypatch.chdir(tmp_path)
    status, out, errors = lingrad(*arguments)
    assert (status, out) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "x").exists()


def test_json_to_standard_output_is_all_there_is_on_it(lingrad, tmp_path):
    base, tuned = make(tmp_path)
    status, out, _ = lingrad(
        "convert", base, tuned, "--out", tmp_path / "out", "--rank", 3, "--allow-residual", 1, "--json", "-"
    )
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "out/lingrad_report.json").read_text())
    status, out, _ = lingrad(
        "convert",
        base,
        tuned,
        "--out",
        tmp_path / "again",
        "--rank",
        3,
        "--allow-residual",
        1,
        "--json",
        tmp_path / "report.json",
    )
    assert status == 0
    assert out.splitlines()[-1] == f"Written: {tmp_path / 'again'}"
    assert (tmp_path / "report.json").read_bytes() == (tmp_path / "again/lingrad_report.json").read_bytes()


def test_export_is_what_convert_exact_was(lingrad, tmp_path):
    """A run with a ledger, by the command and by its old spelling: the same folder, and one line that names the new one."""
    model = llama(torch.float32)
    model.save_pretrained(tmp_path / "START")
    optimizer = lingrad_.wrap(model, "svd(rank=4, every=3)", lr=1e-2, ledger=True)
    train(model, optimizer, text_batches(5))
    model.save_pretrained(tmp_path / "RUN")
    torch.save(optimizer.state_dict(), tmp_path / "RUN/optimizer.pt")
    base, run, new, old, alone = (tmp_path / name for name in ("START", "RUN", "NEW", "OLD", "ALONE"))
    status, out, errors = lingrad("export", run, "--start", base, "--out", new, "--logits")
    assert status == 0, errors
    assert "deprecated" not in errors
    assert "outputs on 2 x 16 random token ids: through PEFT they differ by at most" in out
    status, again, errors = lingrad("convert", base, "--out", old, run, "--logits", "--exact")
    assert status == 0, errors
    assert again == out.replace("NEW", "OLD")
    assert errors.splitlines()[0] == "deprecated: lingrad convert --exact; use lingrad export RUN --start START"
    assert contents(old) == contents(new)
    status, out, errors = lingrad("convert", run, "--exact", "--rank", 3, "--allow-residual", 1, "--out", alone, "--json", "-")
    assert status == 0, errors
    assert {row["rank"] for row in json.loads(out)["rows"] if row["kind"] == "low_rank"} == {3}


def test_without_peft_one_sentence_says_what_to_install(lingrad, tmp_path, monkeypatch):
    """Before anything is searched: what a check at the end needs is asked for at the start."""
    base, tuned = make(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    status, _, errors = lingrad("convert", base, tuned, "--out", tmp_path / "out")
    assert status == 2
    assert errors.splitlines()[-1].endswith("needs the package peft: pip install 'lingrad[hf]'")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_a_checkpoint_of_lingrads_trainer(tmp_path, mode):
    """What the Trainer saves of a run with a ledger is all that an export needs, in both modes; in float32 the adapter
    leaves the rounding of 8 steps, a few 1e-7 of the weight and 1e-5 of the change."""
    model = llama(torch.float32)
    model.save_pretrained(tmp_path / "base")
    options = {"save_strategy": "steps", "save_steps": 8}
    trainer = make_trainer(tmp_path / "run", model=model, args=options, mode=mode, ledger=True)
    trainer.train()
    report = convert.convert_run(tmp_path / "run/checkpoint-8", tmp_path / "out", start=tmp_path / "base", logits=True)
    assert {row.rank for row in report.rows if row.kind == "low_rank"} == {12}
    assert report.residual <= 1e-5
    assert report.outputs.difference <= 1e-5 * report.outputs.largest
