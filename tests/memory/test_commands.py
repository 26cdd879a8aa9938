"""`lingrad memory`, and the jobs behind it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lingrad import memory
from lingrad.errors import DataError, SpecError
from lingrad.memory import commands
from lingrad.memory.cuda.snapshot import load_snapshot

SMALL = commands.Asked("demo", "svd(rank=16)", length=32)


def test_one_run_is_a_table_and_a_verdict(lingrad, tmp_path):
    files = {suffix: tmp_path / f"run.{suffix}" for suffix in ("json", "png", "pickle")}
    status, out, _ = lingrad(
        *("memory", "--model", "demo", "--spec", "svd(rank=16)", "--mode", "adapter", "--seq", "32", "--capacity", "1GiB"),
        *("--json", files["json"], "--plot", files["png"], "--snapshot", files["pickle"]),
    )
    assert status == 0
    assert "fits in 1.00 GiB" in out
    assert json.loads(files["json"].read_text())["fits"] is True
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert load_snapshot(files["pickle"])["device_traces"]


def test_a_comparison(lingrad, tmp_path):
    chart = tmp_path / "bars.png"
    status, out, errors = lingrad(
        "memory", "--model", "demo", "--spec", "svd(rank=16)", "--compare", "--plot", chart, "--capacity", "1MiB"
    )
    assert status == 0
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "full adamw",
        "galore_torch (rank 16), adamw",
        "optimizer mode, svd(rank=16), adamw",
        "adapter mode, svd(rank=16), adamw",
        "LoRA (rank 16), adamw",
    ]
    assert all(line.endswith("does NOT fit") for line in lines[1:])
    assert "simulating full adamw" in errors
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_largest_batch(lingrad):
    status, out, _ = lingrad(
        "memory", "--model", "demo", "--spec", "svd(rank=16)", "--seq", "32", "--capacity", "200MiB", "--max-batch"
    )
    assert status == 0
    rows = int(out.split()[0])
    asked = replace(SMALL, capacity="200MiB")
    assert replace(asked, batch=rows).simulate(asked.method).fits
    assert not replace(asked, batch=rows + 1).simulate(asked.method).fits


def test_not_even_one_row(lingrad):
    status, out, _ = lingrad("memory", "--model", "demo", "--spec", "svd(rank=16)", "--capacity", "1MiB", "--max-batch")
    assert status == 0
    assert out.startswith("not even one row of 256 tokens fits in 1MiB")


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 2**16, 2**17 - 1])
def test_bisection(limit):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= limit

    assert commands._bisect(fits) == min(limit, commands.LARGEST)
    assert len(tried) <= 2 * 17 + 2


def test_closed_form(lingrad):
    status, out, _ = lingrad("memory", "--model", "llama-70b", "--spec", "svd(rank=128)", "--closed-form")
    assert status == 0
    assert "68,976,648,192 parameters" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-7"], "lingrad: no model 'llama-7'; did you mean 'llama-7b'?"),
        (["--model", "demo", "--spec", "svdd(rank=4)"], "lingrad: unknown transform 'svdd'; did you mean 'svd'?"),
        (["--model", "demo", "--base", "adamm"], "lingrad: unknown base optimizer 'adamm'; did you mean 'adam'?"),
        (["--model", "demo", "--mode", "adaptor"], "lingrad: mode must be one of optimizer, adapter, not 'adaptor'"),
        (["--model", "demo", "--dtype", "fp8"], "lingrad: dtype must be one of bfloat16, float16, float32, not 'fp8'"),
        (["--model", "demo", "--batch", "0"], "lingrad: batch must be at least 1, not 0"),
        (["--model", "demo", "--seq", "1"], "lingrad: a row needs two tokens or more, not 1"),
        (["--model", "demo", "--capacity", "big"], "lingrad: 'big' is no size in bytes"),
        (["--model", "demo", "--max-batch"], "lingrad: the largest batch is that which fits a memory; say how large that is"),
        (["--model", "demo", "--spec", "full()", "--compare"], "lingrad: a comparison needs one rank for all methods"),
        (
            ["--model", "demo", "--plot", "x.foo", "--spec", "svd(rank=16)", "--seq", "8"],
            "lingrad: cannot write x.foo: Format 'foo'",
        ),
        (["--model", "demo", "--compare", "--max-batch"], "lingrad: --compare and --max-batch are different questions"),
        (["--model", "demo", "--compare", "--json", "x.json"], "lingrad: --json has no effect with --compare; leave it out"),
        (["--model", "demo", "--max-batch", "--plot", "x.png"], "lingrad: --plot has no effect with --max-batch"),
        (["--model", "demo", "--closed-form", "--snapshot", "x"], "lingrad: --snapshot has no effect with --closed-form"),
        (["--model", "demo", "--closed-form", "--capacity", "1GiB"], "lingrad: --closed-form knows no peak"),
        (
            ["--model", "demo", "--json", "/nowhere/run.json"],
            "lingrad: cannot write /nowhere/run.json: there is no folder /nowhere",
        ),
    ],
)
def test_errors_are_one_message_and_status_2(lingrad, arguments, message):
    status, out, errors = lingrad("memory", *arguments)
    assert (status, out) == (2, "")
    assert errors.splitlines()[0].startswith(message)


def test_errors_of_jobs_have_types():
    with pytest.raises(SpecError, match="say how large that is"):
        commands.largest_batch(SMALL)
    with pytest.raises(DataError, match="cannot write"):
        commands.Outputs(plot=Path("/nowhere/run.png"))


def test_a_comparison_leaves_out_what_is_not_installed(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "galore_torch", None)
    text = commands.compare(SMALL)
    assert "left out: galore_torch (rank 16), adamw (" in text
    assert "LoRA (rank 16)" in text


def test_tables_of_reports_line_up():
    report = SMALL.simulate(memory.FullRank("sgd"))
    lines = commands.table({"a": report, "a longer name": report}).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
