"""What every command has: -h, --quiet, --import, --json -, and one spelling of sizes and dtypes."""

import io
import json
import re
import sys

import pytest
import typer

from lingrad import __version__, cli, console
from lingrad.errors import SpecError
from lingrad.memory.units import parse_bytes
from lingrad.transforms import registry

ROOT = typer.main.get_command(cli.app)
PATHS = [(), ("memory",), *((name,) for name in ROOT.commands if name != "memory"), ("memory", "fit")]
SMALL = ("--model", "demo", "--rules", "svd(rank=8)", "--length", "8")

MINE = """
from lingrad import SideTransform, register
from lingrad.transforms import orthonormalize

@register("imported_by_a_test")
class Mine(SideTransform):
    def basis(self, seen, old, when):
        return orthonormalize(seen.matmul(seen.rmatmul(old).t()), seed=0)
"""


@pytest.fixture(autouse=True)
def loud():
    yield
    console.quiet = False


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_the_shared_options_are_in_every_help(lingrad, path):
    status, out, errors = lingrad(*path, "-h")
    assert (status, errors) == (0, "")
    assert out == lingrad(*path, "--help")[1]
    assert "-q, --quiet" in out
    assert "--import FILE.py" in out


def test_every_command_has_json():
    def leaves(command):
        return (
            [leaf for child in command.commands.values() for leaf in leaves(child)]
            if hasattr(command, "commands")
            else [command]
        )

    assert [leaf.name for leaf in leaves(ROOT) if "json" not in {param.name for param in leaf.params}] == []


def test_the_version(lingrad):
    assert lingrad("--version") == (0, f"{__version__}\n", "")
    assert json.loads(lingrad("version", "--json", "-")[1]) == {"lingrad": __version__}


def test_methods_as_json(lingrad):
    status, out, _ = lingrad("methods", "--json", "-")
    assert status == 0
    assert {row["method"].partition("(")[0] for row in json.loads(out)} >= {"`galore", "`fira"}


@pytest.mark.parametrize("before", [True, False])
def test_quiet_shows_results_only(lingrad, before):
    words = ["memory", "fit", *SMALL, "--capacity", "1MiB"]
    _, out, errors = lingrad(*(["-q", *words] if before else [*words, "--quiet"]))
    assert errors == ""
    assert out.startswith("not even one row of 8 tokens")
    assert lingrad(*words)[2] == "simulating a batch of 1\n"  # not from then on


def test_a_file_of_ones_own_is_run_first(lingrad, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    try:
        status, out, errors = lingrad("explain", "imported_by_a_test(rank=4)", "--import", tmp_path / "mine.py")
        assert (status, errors) == (0, "")
        assert "imported_by_a_test(rank=4)" in out
        assert lingrad("--import", tmp_path / "mine.py", "explain", "imported_by_a_test(rank=4)")[0] == 0
    finally:
        registry._registered.pop("imported_by_a_test", None)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "there is no file"), ("1 / 0", "fails: .*division by zero")], ids=["missing", "fails"]
)
def test_a_file_that_cannot_be_run(lingrad, tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    status, out, errors = lingrad("version", "--import", tmp_path / "mine.py")
    assert (status, out) == (2, "")
    assert re.search(message, errors)


def test_the_runs_of_a_plan_import_what_the_plan_names(lingrad, tmp_path):
    status, _, errors = lingrad("run", "plan.toml", "--out", tmp_path, "--import", "mine.py")
    assert status == 2
    assert "name the file in the plan, imports = ['FILE.py']" in errors


@pytest.mark.parametrize("text", ["24GiB", "24G", "24g", "24 gib", "24576M", "25769803776B"])
def test_one_size_in_several_spellings(text):
    assert parse_bytes(text) == 24 * 2**30


def test_a_number_without_a_unit_is_no_size():
    with pytest.raises(SpecError, match="write a number and a unit"):
        parse_bytes("25769803776")


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("0", 0), ("1.5K", 1536)])
def test_other_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "BF16", "torch.bfloat16"])
def test_one_dtype_in_several_spellings(lingrad, dtype):
    status, out, _ = lingrad("memory", "estimate", *SMALL, "--dtype", dtype)
    assert status == 0
    assert out == lingrad("memory", "estimate", *SMALL)[1]
    assert out != lingrad("memory", "estimate", *SMALL, "--dtype", "fp32")[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_shown_that_a_silent_command_runs(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setattr(console, "_silent", True)
    ran = []

    class Now:
        """A timer whose time is over when it starts."""

        def __init__(self, seconds, function):
            assert seconds == 2.0
            self.start = function

        def cancel(self):
            ran.append("cancelled")

    monkeypatch.setattr(console, "Timer", Now)
    with console.alive("lingrad explain"):
        pass
    assert sys.stderr.getvalue() == ("lingrad explain: running ...\n" if terminal else "")
    assert ran == ["cancelled"]
