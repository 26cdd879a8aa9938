"""The command line, end to end: tables, results, messages and exit codes."""

import json
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from lingrad.cli import app
from lingrad.config.explain import explain
from lingrad.models import LlamaShape
from lingrad.research import commands, plans, report
from tests.support.models import llama, zoo


@pytest.fixture
def tiny(monkeypatch):
    """Jobs on a model of one layer; 64 wide, since the demo's methods have rank 64."""
    shape = LlamaShape(hidden=64, intermediate=64, layers=1, heads=2, length=16)
    monkeypatch.setattr(plans, "Setup", partial(plans.Setup, model=shape, eval_batches=2))


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
        (["train", "--text", "nowhere.txt"], "lingrad: cannot read the text nowhere.txt: No such file or directory\n"),
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


def check_results(folder, labels, steps):
    assert {p.name for p in folder.iterdir()} == {"result.json", "table.md", "loss.png", "gap.png"}
    result = report.load(folder)
    assert [record.label for record in result.records] == labels
    for record in result.records:
        assert len(record.train) == len(record.seconds) == len(record.gradient_bytes) == steps
        assert record.valid[0][0] == 0
        assert record.valid[-1][0] == steps
        assert record.state_bytes > 0
    assert all(len(r.gaps) == steps for r in result.records if r.label in {d.label for d in result.double if d.gaps})
    for name in ("loss.png", "gap.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    return result


DEMO = [
    "adamw, full rank",
    "GaLore, optimizer mode",
    "GaLore, adapter mode",
    "GaLore, mode switched twice",
    "GaLore, batch rows reversed (control)",
    "Random map",
    "Online PCA",
]


def check_demo(output, folder, steps):
    result = check_results(folder, DEMO, steps)
    assert f"step {steps} of {steps}" in output
    assert (folder / "table.md").read_text() in output
    # the modes differ by no more than rounding does, which the control shows and bases of close singular values amplify
    gaps = {record.label: max(gap for _, gap, _ in record.gaps) for record in result.double if record.gaps}
    control = gaps.pop("GaLore, batch rows reversed (control)")
    assert max(gaps.values()) < max(1e-11, control)
    return result


def test_demo(lingrad, tiny, tmp_path):
    status, *told = lingrad("demo", "--steps", "8", "--out", tmp_path / "demo")
    assert status == 0
    check_demo("".join(told), tmp_path / "demo", 8)


@pytest.mark.slow
def test_demo_at_its_own_size(lingrad, tmp_path):
    status, *told = lingrad("demo", "--steps", "60", "--out", tmp_path / "demo")
    assert status == 0
    result = check_demo("".join(told), tmp_path / "demo", 60)
    full, galore, adapter, *_ = result.records
    # rank is a quarter of the width: moments and bases of linear layers shrink, and so do gradients off refresh steps
    assert galore.state_bytes == adapter.state_bytes < 0.4 * full.state_bytes
    assert min(galore.gradient_bytes) == min(adapter.gradient_bytes) < 0.3 * min(full.gradient_bytes)
    for record in result.records:
        assert record.valid[-1][1] < record.valid[0][1] - 2.0
    assert galore.refreshes == 2


def test_train_on_the_users_own_text(lingrad, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("to be, or not to be, that is the question: " * 60)
    out = tmp_path / "out"
    spec = "random(rank=4, every=2, kind=rows)"
    status, _, errors = lingrad("train", "--text", text, "--rules", spec, "--steps", "6", "--length", "16", "--out", out)
    assert status == 0, errors
    labels = ["adamw, full rank", *(f"{spec}, {way}" for way in ("optimizer mode", "adapter mode", "mode switched twice"))]
    result = check_results(out, [*labels, f"{spec}, batch rows reversed (control)"], 6)
    assert all(record.valid[-1][1] < record.valid[0][1] for record in result.records)
    assert result.text == "mine.txt"


@pytest.mark.slow
def test_options_of_train_reach_the_run(tiny, tmp_path):
    from lingrad.research import commands

    text = tmp_path / "mine.txt"
    text.write_text("to be, or not to be, that is the question: " * 60)
    common = {"base": "sgd", "lr": 0.1, "scale": 1.0, "carry": "keep", "steps": 3, "length": 16}
    losses = set()
    momentum = {"base": "adamw", "steps": 4}  # a carry shows where there are moments to carry
    changes = ({}, {"base": "adamw"}, {"lr": 0.2}, {"scale": 0.5}, {"steps": 5}, {"length": 8}, momentum)
    changes += tuple(momentum | {"carry": carry} for carry in ("reset", "rotate"))
    for change in changes:
        result = commands.train(text, "random(rank=2, every=1)", tmp_path / "out", **common | change)
        losses.add(result.records[1].valid[-1][1])
    assert len(losses) == len(changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "is not in UTF-8 (byte 0)"),
        (b"too short", "mine.txt is too short: its last tenth is 1 tokens, and a window is 64; give a longer text"),
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
    assert "lingrad: cannot write the results to" in errors
    assert "step" not in output  # nothing was trained for nothing


def test_a_learning_rate_that_cannot_be_meant(lingrad, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("call me ishmael. " * 100)
    status, _, errors = lingrad("train", "--text", text, "--lr", "-1", "--length", "8", "--out", tmp_path / "out")
    assert status == 2
    assert errors == "lingrad: base 'adamw' refused its options (lr=-1.0): Invalid learning rate: -1.0\n"
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


def test_json_of_the_demo_is_all_there_is_on_standard_output(lingrad, tiny, tmp_path):
    status, out, _ = lingrad("demo", "--steps", "3", "--out", tmp_path / "demo", "--json", "-")
    assert status == 0
    assert out == (tmp_path / "demo/result.json").read_text() + "\n"


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
