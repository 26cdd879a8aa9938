"""The command line, end to end: tables, results, messages and exit codes."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lingrad.cli import app
from lingrad.config.explain import explain
from lingrad.research import commands
from lingrad.research.results import read_results
from lingrad.research.training import train
from lingrad.research.ways import make_method
from tests.support.models import llama, zoo


@pytest.fixture
def tiny(monkeypatch):
    """Runs on a model of one layer; 64 wide, since the demo's methods have rank 64."""
    small = {"rows": 2, "hidden": 64, "layers": 1}
    monkeypatch.setattr(commands, "SMALL", small)
    read = commands.read_plan

    def shrunk(path):
        content = read(path)
        return {**content, "task": {**content["task"], **small, "length": 16, "held": 8}}

    monkeypatch.setattr(commands, "read_plan", shrunk)


def test_explain_shows_the_resolution():
    result = CliRunner().invoke(app, ["explain", "svd(rank=64)"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["parameter", "weight", "transform", "coords", "basis", "gradient", "trained"]
    assert len({len(line) for line in lines[:-1]}) == 1
    row = next(line for line in lines if "down_proj" in line)
    assert re.split("  +", row) == [
        "model.layers.*.mlp.down_proj.weight (x 3)",
        "256 x 688",
        "svd(rank=64)",
        "64 x 688",
        "256 x 64",
        "projected",
        "132,096",
    ]
    assert lines[-1] == "725,760 of 2,504,448 elements are stepped by the base optimizer (29.0%)"


def test_explain_with_rules_and_every_parameter():
    result = CliRunner().invoke(app, ["explain", "*embed*: random(rank=8, kind=rows); *: none", "--all"])
    assert result.exit_code == 0
    assert "model.embed_tokens.weight" in result.stdout
    assert result.stdout.count("q_proj") == 3
    assert "hook" in result.stdout.splitlines()[2]


def test_explain_shows_what_a_rule_freezes():
    result = CliRunner().invoke(app, ["explain", "*norm*: frozen; *: svd(rank=8)"])
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "input_layernorm" in line)
    assert re.split("  +", row.strip())[2:] == ["frozen", "-", "-", "-", "0"]


def test_explain_reads_a_config_from_disk_and_makes_no_weights(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place in (tmp_path, tmp_path / "config.json"):
        result = CliRunner().invoke(app, ["explain", "svd(rank=1024)", "--model", str(place)])
        assert result.exit_code == 0, result.output
        assert "of 68,976,648,192 elements" in result.stdout  # 70B; its weights would not fit here


def test_explain_counts_what_the_optimizer_trains():
    import lingrad

    for build, rules in ((llama, "svd(rank=4)"), (zoo, {"*": "svd(rank=1)"})):
        explanation = explain(build(), rules)
        optimizer = lingrad.wrap(build(), rules, lr=1e-3)
        assert explanation.trained == sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        assert explanation.parameters == sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["explain", "svd(rnak=64)"],
            "lingrad: unknown option 'rnak' of svd; did you mean 'rank'?\n  svd(rnak=64)\n      ^^^^\n"
            "svd takes: rank, every, side, clip, schedule, solver, oversample, precision, align, choice, energy.\n",
        ),
        (
            ["explain", "svd(rank=4)", "--model", "nowhere"],
            "lingrad: no model 'nowhere'. Expected demo, llama-60m, llama-130m, llama-350m, llama-1b, llama-7b, llama-13b, "
            "llama-70b, a config.json of transformers, or a folder that holds one (models are read from disk only)\n",
        ),
        (
            ["train", "--text", "nowhere.txt"],
            f"lingrad: cannot read the text {Path.cwd()}/nowhere.txt: No such file or directory\n",
        ),
    ],
)
def test_errors_are_one_message_and_status_2(lingrad, arguments, message):
    assert lingrad(*arguments) == (2, "", message)


def test_a_folder_without_a_config(lingrad, tmp_path):
    status, _, errors = lingrad("explain", "svd(rank=4)", "--model", tmp_path)
    assert status == 2
    assert errors.startswith(f"lingrad: '{tmp_path}' holds no config that transformers can build a model from")


def test_a_config_no_model_can_be_built_from(lingrad, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}')
    status, _, errors = lingrad("explain", "svd(rank=4)", "--model", tmp_path)
    assert status == 2
    assert "holds no config that transformers can build a model from" in errors


def test_the_program_itself():
    run = subprocess.run([sys.executable, "-m", "lingrad", "version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"{version('lingrad')}\n"


def test_a_missing_typer_names_the_extra():
    program = "import sys; sys.modules['typer'] = None; from lingrad.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "lingrad: the command line needs the package typer: pip install 'lingrad[cli]'\n"


GAPS = ("gap", "gap_control", "gap_switched")
DEMO = ["AdamW, full rank", "GaLore, optimizer mode", "GaLore, adapter mode", "GaLore, float64", "Random map", "Online PCA"]


def check_results(output, folder, names, steps):
    """The results of a command that compares modes; returns the runs by entry."""
    plan, runs = read_results([folder])
    assert plan.steps == steps
    found = {run.entry: run for run in runs}
    assert list(found) == names
    assert [run.final for run in runs] == [True] * len(names)  # nothing is searched
    for run in runs:
        assert not run.failed, run.error
        assert run.curve[-1][0] == run.info["steps"] == steps
        assert run.info["simulated_peak_bytes"] > run.info["state_bytes"] > 0
    assert (folder / "report.md").read_text() in output
    written = {"report.md", "report.json", "report.html", "curves.png", "pareto.png", "diagnostics.png"}
    assert {path.name for path in folder.iterdir()} == {*written, "plan.json", "search.journal", "runs"}
    measured = [run.entry for run in runs if run.measured]
    assert measured == [name for name in names if name in ("GaLore, optimizer mode", "GaLore, float64", *MODES)]
    return found


MODES = ("optimizer mode", "float64")  # the entries of `lingrad train` that others are compared with


def check_gaps(run):
    """In float64 the modes differ by no more than rounding does, which the control shows."""
    assert tuple(sorted(run.measured)) == GAPS
    gaps = {name: max(value for _, value in points) for name, points in run.measured.items()}
    control = gaps.pop("gap_control")
    assert max(gaps.values()) < max(1e-11, control)


@pytest.mark.slow
def test_demo(lingrad, tiny, tmp_path):
    status, *told = lingrad("demo", "--steps", "8", "--out", tmp_path / "demo")
    assert status == 0
    found = check_results("".join(told), tmp_path / "demo", DEMO, 8)
    check_gaps(found["GaLore, float64"])
    assert "demo: run 6 of 6" in "".join(told)
    status, out, errors = lingrad("demo", "--steps", "8", "--out", tmp_path / "demo", "--json", "-")
    assert f"{tmp_path / 'demo'} holds all runs of this plan already" in errors
    assert [entry["name"] for entry in json.loads(out)["entries"]] == DEMO
    status, _, errors = lingrad("demo", "--steps", "9", "--out", tmp_path / "demo")
    assert status == 2
    assert errors.startswith(f"lingrad: {tmp_path / 'demo'} holds the results of another plan")


@pytest.mark.slow
def test_demo_at_its_own_size(lingrad, tmp_path):
    status, *told = lingrad("demo", "--steps", "60", "--out", tmp_path / "demo")
    assert status == 0
    found = check_results("".join(told), tmp_path / "demo", DEMO, 60)
    check_gaps(found["GaLore, float64"])
    full, galore, adapter = (found[name].info for name in DEMO[:3])
    # rank is a quarter of the width: moments and bases of linear layers shrink, and so do gradients off refresh steps
    assert galore["state_bytes"] == adapter["state_bytes"] < 0.4 * full["state_bytes"]
    assert galore["gradient_bytes_median"] == adapter["gradient_bytes_median"] < 0.3 * full["gradient_bytes"]
    for run in found.values():
        assert run.info["metrics"]["loss"] < run.curve[0][1] - 2.0


@pytest.mark.slow
def test_train_on_the_users_own_text(lingrad, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("to be, or not to be, that is the question: " * 60)
    out = tmp_path / "out"
    rules = "random(rank=4, every=2, kind=rows)"
    status, *told = lingrad("train", "--text", text, "--rules", rules, "--steps", "6", "--length", "16", "--out", out)
    assert status == 0, told
    found = check_results("".join(told), out, ["adamw, full rank", "optimizer mode", "adapter mode", "float64"], 6)
    assert all(run.curve[-1][1] < run.curve[0][1] for run in found.values())
    check_gaps(found["float64"])


def test_options_of_train_reach_the_run(tiny, tmp_path, monkeypatch):
    text = tmp_path / "mine.txt"
    text.write_text("to be, or not to be, that is the question: " * 60)
    plans = []
    monkeypatch.setattr(commands, "_run", lambda plan, *_, **__: plans.append(plan))
    common = {"base": "sgd", "lr": 0.1, "scale": 1.0, "carry": "keep", "steps": 3, "length": 16}
    momentum = {"base": "adamw", "steps": 4}  # a carry shows where there are moments to carry
    changes = ({}, {"base": "adamw"}, {"lr": 0.2}, {"scale": 0.5}, {"steps": 5}, {"length": 8}, momentum)
    changes += tuple(momentum | {"carry": carry} for carry in ("reset", "rotate"))
    losses = set()
    for change in changes:
        commands.train(text, "random(rank=2, every=1)", tmp_path, **common | change)
        entry = plans[-1].entry("adapter mode")
        method = make_method(entry, {}, seed=1, folder=tmp_path)
        losses.add(train(plans[-1].of(entry), method, seed=1, part="final", out=None)["metrics"]["loss"])
    assert len(losses) == len(changes)


def test_the_demo_keeps_to_its_plan_but_for_the_steps(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(commands, "_run", lambda plan, *_, **__: plans.append(plan))
    commands.demo(tmp_path)
    commands.demo(tmp_path, steps=7)
    assert [plan.steps for plan in plans] == [200, 7]
    assert [entry.name for entry in plans[0].entries] == DEMO
    assert plans[0].trials == 0
    assert {entry.dtype for entry in plans[0].entries} == {"", "float64"}
    assert plans[0].of(plans[0].entry("GaLore, float64")).dtype == "float64"
    assert plans[0].of(plans[0].entry("Random map")).diagnostics == ()


@pytest.mark.slow
def test_train_with_a_transform_of_an_imported_file(lingrad, tiny, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    text = tmp_path / "mine.txt"
    text.write_text("to be, or not to be, that is the question: " * 60)
    more = ("--steps", "3", "--length", "8", "--out", tmp_path / "out", "--import", tmp_path / "mine.py")
    status, *told = lingrad("train", "--text", text, "--rules", "brought_to_train(rank=2)", *more)
    assert status == 0, told
    assert not any(run.failed for run in read_results([tmp_path / "out"])[1])


MINE = """
from lingrad import SideTransform, register
from lingrad.transforms import orthonormalize

@register("brought_to_train")
class BroughtToTrain(SideTransform):
    def basis(self, seen, old, when):
        return orthonormalize(seen.matmul(seen.rmatmul(old).t()), seed=0)
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "is not in UTF-8 (byte 0)"),
        (b"too short", "mine.txt is too short: its shortest part has 0 tokens, and a window 64; expected more in each"),
    ],
)
def test_texts_that_cannot_be_trained_on(lingrad, tmp_path, content, message):
    text = tmp_path / "mine.txt"
    text.write_bytes(content)
    status, _, errors = lingrad("train", "--text", text, "--out", tmp_path / "out")
    assert status == 2
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written(lingrad, tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    text = tmp_path / "mine.txt"
    text.write_text("call me ishmael. " * 100)
    status, output, errors = lingrad(
        "train", "--text", text, "--steps", "3", "--length", "8", "--out", tmp_path / "file" / "out"
    )
    assert status == 2
    assert "lingrad: cannot write results to" in errors
    assert "step" not in output  # nothing was trained for nothing


def test_a_learning_rate_that_cannot_be_meant(lingrad, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("call me ishmael. " * 100)
    status, _, errors = lingrad("train", "--text", text, "--lr", "-1", "--length", "8", "--out", tmp_path / "out")
    assert status == 2
    assert errors == "lingrad: entry 'adamw, full rank': lr must be a number, 0 or more, not -1.0\n"
    assert not (tmp_path / "out").exists()


def test_learning_rates_that_cannot_be_searched(lingrad, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("call me ishmael. " * 100)
    words = ("find-lr", "--text", text, "--length", "8", "--low", "1", "--high", "0.1", "--out")
    assert lingrad(*words, tmp_path / "out")[::2] == (2, "lingrad: high must be a learning rate above low = 1.0, not 0.1\n")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    lingrad(*words, tmp_path / "mine")
    assert (tmp_path / "mine").exists()  # which was there before


def test_json_of_an_explanation(lingrad, tmp_path):
    status, out, _ = lingrad("explain", "svd(rank=64)", "--json", "-")
    assert status == 0
    found = json.loads(out)
    assert (found["trained"], found["parameters"]) == (725_760, 2_504_448)
    assert {line["transform"] for line in found["lines"]} == {"svd(rank=64)", "in full"}
    status, text, _ = lingrad("explain", "svd(rank=64)", "--json", tmp_path / "lines.json")
    assert status == 0
    assert text.startswith("parameter")
    assert json.loads((tmp_path / "lines.json").read_text()) == found


def test_interrupting(lingrad, monkeypatch):

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "demo", interrupt)
    assert lingrad("demo")[0] == 130
