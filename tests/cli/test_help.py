"""What the command line says of itself, exit codes, completion, and the command lines of the version before."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lingrad import cli, deprecated
from lingrad.errors import SpecError
from lingrad.memory import commands
from lingrad.research import commands as research_commands

ROOT = typer.main.get_command(cli.app)


def leaves(command=ROOT, path=()):
    """Every command that runs something, by the words that call it."""
    if not hasattr(command, "commands"):
        return {path: command}
    return {name: leaf for key, child in command.commands.items() for name, leaf in leaves(child, (*path, key)).items()}


LEAVES = leaves()


def example(text):
    return shlex.split(text.split("Example:\n")[1].splitlines()[0])


def test_the_commands():
    assert {" ".join(path) for path in LEAVES} == {
        "demo",
        "train",
        "run",
        "report",
        "find-lr",
        "explain",
        "check-adapter",
        "memory simulate",
        "memory fit",
        "memory compare",
        "memory estimate",
        "convert",
        "export",
        "merge",
        "methods",
        "version",
    }


@pytest.mark.parametrize("path", [(), ("memory",), *LEAVES], ids=" ".join)
def test_every_command_has_a_description_and_an_example_that_parses(lingrad, path):
    status, out, errors = lingrad(*path, "--help")
    assert (status, errors) == (0, "")
    description = out.split("\n\n")[1].strip()
    assert description[0].isupper()
    assert description.endswith(".")
    words = example(out)
    assert tuple(words[: 1 + len(path)]) == ("lingrad", *path)
    called = next(leaf for leaf in LEAVES if leaf == tuple(words[1 : 1 + len(leaf)]))
    LEAVES[called].make_context("lingrad", words[1 + len(called) :])  # raises a usage error otherwise
    assert deprecated.command_line(words[1:]) == words[1:]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_option_has_a_help_text(path):
    for param in LEAVES[path].params:
        assert param.help, param.name
        assert param.help.endswith((".", "'")), param.name


@pytest.mark.parametrize("group", [(), ("memory",)], ids=str)
def test_lists_of_commands_are_not_cut_off(lingrad, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = lingrad(*group, "--help")
    assert status == 0
    assert "..." not in out.split("Commands:")[1]


def test_the_exit_codes_are_stated(lingrad):
    status, out, _ = lingrad("--help")
    assert status == 0
    text = " ".join(out.split())
    for code in (
        *("Exit codes: 0 done", "1 an unexpected error, with a traceback", "2 wrong input", "130 interrupted"),
        "3 what lingrad memory simulate or fit was asked about does not fit in --capacity",
    ):
        assert code in text
        assert code.removeprefix("Exit codes: ") in " ".join((Path(__file__).parents[2] / "docs/memory.md").read_text().split())


def test_exit_codes_are_those(lingrad, monkeypatch):
    assert lingrad("version")[0] == 0
    assert lingrad("explain", "svd(rnak=4)")[0] == 2
    assert lingrad("explain", "--nothing")[0] == 2
    assert lingrad("nothing")[0] == 2

    def raising(error):
        def fail(*_, **__):
            raise error

        return fail

    monkeypatch.setattr(research_commands, "demo", raising(KeyboardInterrupt()))
    assert lingrad("demo")[0] == 130
    monkeypatch.setattr(research_commands, "demo", raising(RuntimeError("unexpected")))
    with pytest.raises(RuntimeError, match="unexpected"):
        lingrad("demo")
    program = "import sys, lingrad.cli as cli; cli.typer.echo = None; sys.argv = ['lingrad', 'version']\n"
    program += "from lingrad.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "Traceback" in run.stderr


@pytest.mark.thinned(3)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    def run(**env):
        command = [sys.executable, "-m", "lingrad"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={**BARE, **env}).stdout

    script = run(_LINGRAD_COMPLETE=f"source_{shell}")
    assert "lingrad" in script
    assert f"_LINGRAD_COMPLETE=complete_{shell}" in script


def test_completion_knows_commands_and_options():
    def complete(words, number):
        env = {**BARE, "_LINGRAD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        command = [sys.executable, "-m", "lingrad"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()

    assert complete("lingrad memory ", 2) == ["simulate", "fit", "compare", "estimate"]
    assert complete("lingrad memory fit --cap", 3) == ["--capacity"]


BARE = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}


DEMO = ["--model", "demo", "--length", "16", "--rules", "svd(rank=8)"]
OLD_DEMO = ["--model", "demo", "--seq", "16", "--spec", "svd(rank=8)"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (["memory", *OLD_DEMO], ["memory", "simulate", *DEMO], "lingrad memory without a command; use lingrad memory simulate"),
        (
            ["memory", "--compare", *OLD_DEMO, "--mode", "adapter"],
            ["memory", "compare", *DEMO],
            "lingrad memory --compare; use lingrad memory compare",
        ),
        (
            ["memory", *OLD_DEMO, "--batch=3", "--capacity", "20MiB", "--max-batch"],
            ["memory", "fit", *DEMO, "--capacity", "20MiB"],
            "lingrad memory --max-batch; use lingrad memory fit",
        ),
        (
            ["memory", *OLD_DEMO, "--closed-form", "--stagger", "--checkpointing", "--expandable"],
            ["memory", "estimate", *DEMO],
            "lingrad memory --closed-form; use lingrad memory estimate",
        ),
    ],
    ids=lambda value: value.split()[-1] if isinstance(value, str) else "",
)
@pytest.mark.thinned(3)
def test_old_command_lines_of_memory_work_and_say_what_to_write(lingrad, old, new, said):
    fits = 3 if "fit" in new else 0  # not with the memory of a CUDA context
    status, out, errors = lingrad(*old)
    assert status == fits, errors
    assert errors.splitlines()[:3] == [
        "deprecated: lingrad memory --seq; use --length",
        "deprecated: lingrad memory --spec; use --rules",
        f"deprecated: {said}",
    ]
    status, expected, errors = lingrad(*new)
    assert status == fits, errors
    assert "deprecated" not in errors
    assert out == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["train", "--spec", "svd(rank=4)", "--text", "t"], ["train", "--rules", "svd(rank=4)", "--text", "t"]),
        (["train", "--spec=svd(rank=4)", "--text", "t"], ["train", "--rules=svd(rank=4)", "--text", "t"]),
        (["memory", "--seq=8", "--model", "demo"], ["memory", "simulate", "--length=8", "--model", "demo"]),
        (["memory", "fit", "--seq", "8"], ["memory", "fit", "--length", "8"]),
        (
            ["memory", "--max-batch", "--batch", "4", "--model", "m"],
            ["memory", "fit", "--model", "m"],
        ),
        (["convert", "RUN", "--exact", "--out", "x"], ["export", "RUN", "--out", "x"]),
        (
            ["convert", "START", "--rank", "4", "RUN", "--out=x", "--exact"],
            ["export", "RUN", "--start", "START", "--rank", "4", "--out=x"],
        ),
    ],
)
def test_old_command_lines_are_translated(capsys, old, new):
    assert deprecated.command_line(old) == new
    assert capsys.readouterr().err.startswith("deprecated: lingrad ")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["memory"],
        ["memory", "--help"],
        ["memory", "fit", "--model", "demo", "--batch", "3"],
        ["explain", "svd(rank=4)"],
        ["convert", "START", "TUNED", "--out", "x"],
    ],
)
def test_present_command_lines_are_left_alone(capsys, words):
    assert deprecated.command_line(words) == words
    assert capsys.readouterr() == ("", "")


def test_two_old_modes_are_refused(lingrad):
    with pytest.raises(SpecError, match="--compare and --max-batch are different commands; run one at a time"):
        deprecated.command_line(["memory", "--compare", "--max-batch"])
    assert lingrad("memory", "--model", "demo", "--compare", "--max-batch")[0] == 2


def test_the_question_of_the_memory_commands_takes_keywords_only():
    with pytest.raises(TypeError):
        commands.Question("demo")


def test_no_command_has_an_option_named_as_one_that_all_have():
    """Values are given by name: of two options with one name, one gets the other's value."""
    for path, command in LEAVES.items():
        names = [param.name for param in command.params]
        assert len(set(names)) == len(names), path
