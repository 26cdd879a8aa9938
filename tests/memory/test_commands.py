"""`lingrad memory simulate | fit | compare | estimate`, and the functions behind them."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from lingrad import cli, memory
from lingrad.cli.common import DOES_NOT_FIT
from lingrad.errors import SpecError
from lingrad.memory import commands
from lingrad.memory.cuda.snapshot import load_snapshot

SMALL = commands.Question(model="demo", rules="svd(rank=16)", length=32)
DEMO = ("--model", "demo", "--rules", "svd(rank=16)")


def test_one_run_is_a_table_and_a_verdict(lingrad, tmp_path):
    files = {suffix: tmp_path / f"run.{suffix}" for suffix in ("json", "png", "pickle")}
    status, out, _ = lingrad(
        *("memory", "simulate", *DEMO, "--mode", "adapter", "--length", "32", "--capacity", "1GiB"),
        *("--json", files["json"], "--plot", files["png"], "--snapshot", files["pickle"]),
    )
    assert status == 0
    assert "fits in 1.00 GiB" in out
    assert json.loads(files["json"].read_text())["fits"] is True
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert load_snapshot(files["pickle"])["device_traces"]


def test_a_comparison(lingrad, tmp_path):
    chart = tmp_path / "bars.png"
    status, out, errors = lingrad("memory", "compare", *DEMO, "--plot", chart, "--capacity", "1MiB")
    assert status == 0
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "full adamw",
        "galore_torch (rank 16), adamw",
        "optimizer mode, svd(rank=16), adamw",
        "adapter mode, svd(rank=16), adamw",
        "LoRA (rank 16), adamw",
    ]
    assert all(line.endswith("does NOT fit") for line in lines[1:6])
    assert " ".join(lines[7:9]).startswith("requested: what tensors ask for")
    assert "simulating full adamw" in errors
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_largest_batch(lingrad):
    status, out, _ = lingrad("memory", "fit", *DEMO, "--length", "32", "--capacity", "712MiB")
    assert status == 0
    rows = int(out.split()[0])
    question = replace(SMALL, capacity="200MiB", context="0")
    assert commands.simulate(replace(question, batch=rows)).fits
    assert not commands.simulate(replace(question, batch=rows + 1)).fits


def test_not_even_one_row(lingrad):
    status, out, _ = lingrad("memory", "fit", *DEMO, "--capacity", "1MiB")
    assert status == DOES_NOT_FIT
    assert out.startswith("not even one row of 256 tokens fits in 1MiB")


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 2**16, 2**17 - 1])
def test_bisection(limit, monkeypatch):
    tried = []

    def simulated(question, method):
        tried.append(question.batch)
        return SimpleNamespace(fits=question.batch <= limit, reserved=question.batch)

    monkeypatch.setattr(commands, "simulate", simulated)
    found = commands.fit(replace(SMALL, capacity="1GiB"))
    assert found.rows == min(limit, commands.LARGEST)
    assert found.reserved == max(found.rows, 1)
    assert found.at_least == (limit >= commands.LARGEST)
    assert len(tried) <= 2 * 17 + 2


def test_closed_form(lingrad):
    status, out, _ = lingrad("memory", "estimate", "--model", "llama-70b", "--rules", "svd(rank=128)")
    assert status == 0
    assert "68,976,648,192 parameters" in out


SMALLER = (*DEMO, "--length", "16")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("arguments", "has"),
    [
        (["simulate", *SMALLER], {"peak", "breakdown", "timeline"}),
        (["fit", *SMALLER, "--capacity", "1GiB", "--context", "900MiB"], {"rows", "reserved", "capacity", "context"}),
        (["compare", *SMALLER], {"reports", "left_out"}),
        (["estimate", *SMALLER], {"totals", "rows"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_to_standard_output_is_all_there_is_on_it(lingrad, tmp_path, arguments, has):
    status, out, _ = lingrad("memory", *arguments, "--json", "-")
    assert status == 0
    assert has <= json.loads(out).keys()
    status, text, _ = lingrad("memory", *arguments, "--json", tmp_path / "report.json")
    assert status == 0
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(out)
    assert text
    assert not text.startswith("{")


def test_every_option_of_every_command_reaches_the_question():
    """An option is a field of the question or names an output; so none is accepted without effect."""
    group = typer.main.get_command(cli.app).commands["memory"]
    questions = set(commands.Question.__dataclass_fields__)
    shared = {"quiet", "brought"}
    outputs = {
        "simulate": {"json", "plot", "snapshot"},
        "fit": {"json"},
        "compare": {"json", "plot"},
        "estimate": {"json"},
    }
    without = {
        "simulate": set(),
        "fit": {"batch"},
        "compare": {"mode", "ranks"},
        "estimate": {"checkpointing", "capacity", "context", "expandable", "stagger"},
    }
    assert group.commands.keys() == outputs.keys()
    for name, command in group.commands.items():
        assert {param.name for param in command.params} == questions - without[name] | outputs[name] | shared, name


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("simulate", {"batch": 2, "length": 64, "mode": "adapter", "base": "sgd", "dtype": "float32", "rules": "svd(rank=8)"}),
        ("simulate", {"checkpointing": True, "layerwise": True, "share": True, "model": "llama-60m"}),
        ("estimate", {"batch": 2, "length": 64, "mode": "adapter", "base": "sgd", "dtype": "float32", "rules": "svd(rank=8)"}),
        ("estimate", {"layerwise": True, "share": True, "model": "llama-60m"}),
        ("estimate", {"ranks": 2}),
        ("estimate", {"offload": "bases"}),
        ("simulate", {"ranks": 2}),
    ],
)
def test_every_option_changes_the_answer(name, changes):
    ask = {"simulate": commands.simulate, "estimate": commands.estimate}[name]
    question = replace(SMALL, rules="svd(rank=16, side=right)")
    before = ask(question).to_json()
    for option, value in changes.items():
        assert ask(replace(question, **{option: value})).to_json() != before, option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "--model", "llama-7"], "lingrad: no model 'llama-7'; did you mean 'llama-7b'?"),
        (["simulate", "--model", "demo", "--rules", "svdd(rank=4)"], "lingrad: unknown transform 'svdd'; did you mean 'svd'?"),
        (["simulate", "--model", "demo", "--base", "adamm"], "lingrad: unknown base optimizer 'adamm'; did you mean 'adam'?"),
        (
            ["simulate", "--model", "demo", "--mode", "adaptor"],
            "lingrad: mode must be one of optimizer, adapter, not 'adaptor'",
        ),
        (
            ["estimate", "--model", "demo", "--mode", "adaptor"],
            "lingrad: mode must be one of optimizer, adapter, not 'adaptor'",
        ),
        (
            ["simulate", "--model", "demo", "--dtype", "fp8"],
            "lingrad: dtype must be one of bfloat16, float16, float32, int8, not 'fp8'",
        ),
        (["simulate", "--model", "demo", "--batch", "0"], "lingrad: batch must be at least 1, not 0"),
        (["fit", "--model", "demo", "--length", "1", "--capacity", "1GiB"], "lingrad: length must be at least 2 tokens, not 1"),
        (["simulate", "--model", "demo", "--capacity", "big"], "lingrad: 'big' is not a size in bytes"),
        (["fit", "--model", "demo", "--capacity", "big"], "lingrad: 'big' is not a size in bytes"),
        (["fit", "--model", "demo", "--capacity", "1GiB", "--context", "big"], "lingrad: 'big' is not a size in bytes"),
        (["fit", "--model", "demoo", "--capacity", "1GiB"], "lingrad: no model 'demoo'; did you mean 'demo'?"),
        (["fit", "--model", "demo", "--capacity", "1GiB", "--rules", "svdd(rank=4)"], "lingrad: unknown transform 'svdd'"),
        (["fit", "--model", "demo", "--capacity", "1GiB", "--base", "adamm"], "lingrad: unknown base optimizer 'adamm'"),
        (["fit", "--model", "demo", "--capacity", "1GiB", "--offload", "moment"], "lingrad: offload='moment'"),
        (["compare", "--model", "demo", "--capacity", "big"], "lingrad: 'big' is not a size in bytes"),
        (["compare", "--model", "demo", "--context", "big"], "lingrad: 'big' is not a size in bytes"),
        (["compare", "--model", "demoo"], "lingrad: no model 'demoo'; did you mean 'demo'?"),
        (["compare", "--model", "demo", "--base", "adamm"], "lingrad: unknown base optimizer 'adamm'"),
        (["compare", "--model", "demo", "--offload", "moment"], "lingrad: offload='moment'"),
        (["compare", "--model", "demo", "--plot", "x.foo"], "lingrad: cannot write x.foo: Format 'foo'"),
        (["compare", "--model", "demo", "--rules", "full()"], "lingrad: a comparison needs one rank for all methods"),
        (
            ["simulate", "--model", "demo", "--plot", "x.foo", "--rules", "svd(rank=16)", "--length", "8"],
            "lingrad: cannot write x.foo: Format 'foo'",
        ),
        (
            ["simulate", "--model", "demo", "--json", "/nowhere/run.json"],
            "lingrad: cannot write /nowhere/run.json: there is no folder /nowhere",
        ),
        (
            ["simulate", "--model", "demo", "--plot", "/nowhere/run.png"],
            "lingrad: cannot write /nowhere/run.png: there is no folder /nowhere",
        ),
    ],
)
def test_errors_are_one_message_and_status_2(lingrad, monkeypatch, arguments, message):
    if "x.foo" in arguments:
        monkeypatch.setattr(commands, "simulate", lambda *_: pytest.fail("simulated before all input was checked"))
    status, out, errors = lingrad("memory", *arguments)
    assert (status, out) == (2, "")
    assert errors.splitlines()[0].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--model", "demo"], "Missing option '--capacity'"),
        (["fit", "--model", "demo", "--capacity", "1GiB", "--plot", "x.png"], "No such option: --plot"),
        (["estimate", "--model", "demo", "--snapshot", "x"], "No such option: --snapshot"),
        (["estimate", "--model", "demo", "--capacity", "1GiB"], "No such option: --capacity"),
        (["compare", "--model", "demo", "--snapshot", "x"], "No such option: --snapshot"),
    ],
)
def test_options_without_effect_are_refused(lingrad, arguments, message):
    status, out, errors = lingrad("memory", *arguments)
    assert (status, out) == (2, "")
    assert message in errors


def test_errors_of_functions_have_types():
    with pytest.raises(SpecError, match="depends on the device's memory; give it, such as --capacity 24GiB"):
        commands.fit(SMALL)
    with pytest.raises(SpecError, match="length must be at least 2 tokens"):
        replace(SMALL, length=1)


def test_a_comparison_leaves_out_what_is_not_installed(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "galore_torch", None)
    found = commands.compare(SMALL)
    assert "left out: galore_torch (rank 16), adamw (" in str(found)
    assert "LoRA (rank 16)" in str(found)
    assert list(json.loads(found.to_json())["left_out"]) == ["galore_torch (rank 16), adamw"]


def test_a_comparison_leaves_out_what_cannot_train_weights_in_8_bits():
    pytest.importorskip("peft")
    found = commands.compare(replace(SMALL, dtype="int8"))
    assert [label.split(",")[0] for label in found.left_out] == ["full adamw", "galore_torch (rank 16)", "optimizer mode"]
    assert all("model.layers.0.self_attn.q_proj.weight is stored as int8" in reason for reason in found.left_out.values())
    assert [label.split(",")[0] for label in found.reports] == ["adapter mode", "LoRA (rank 16)"]


def test_tables_of_reports_line_up():
    report = commands.simulate(SMALL, memory.FullRank("sgd"))
    lines = str(commands.MethodComparison({"a": report, "a longer name": report})).splitlines()
    assert len({len(line) for line in lines[1:3]}) == 1


@pytest.mark.slow
def test_commands_on_the_page_run(lingrad, monkeypatch, tmp_path):
    """The shell lines of docs/memory.md, on the demo's model at a small rank in place of 7B."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines() if line]
    names = set()
    for line in lines:
        program, *arguments = shlex.split(re.sub(r"rank=\d+", "rank=8", line))
        arguments[arguments.index("--model") + 1] = "demo"
        status, out, errors = lingrad(*arguments, "--length", "16")
        assert (program, status) == ("lingrad", 0), line + errors
        assert "deprecated" not in errors
        assert out
        names.add(arguments[1])
    assert names == {"simulate", "fit", "compare", "estimate"}
    assert (tmp_path / "bars.png").exists()


def test_python_on_the_page_runs(monkeypatch, tmp_path):
    import torch

    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/memory.md").read_text(), flags=re.DOTALL)
    block = block.replace("llama-7b", "demo").replace("rank=1024", "rank=8").replace("    ...", "    pass")
    model = torch.nn.Linear(4, 4)
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}
    exec(compile(block, "docs/memory.md", "exec"), names)  # noqa: S102 - our own text
    assert {path.name for path in tmp_path.iterdir()} == {"run.png", "run.pickle", "run.json"}
    assert names["report"].fits


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("vit", "ViTForImageClassification"), ("whisper", "WhisperForConditionalGeneration"), ("clip", "CLIPModel")],
)
def test_models_that_read_no_tokens(lingrad, tmp_path, kind, cls):
    path = written(tmp_path, kind, cls)
    status, out, _ = lingrad("memory", "simulate", "--model", path, "--rules", "svd(rank=16, clip=true)", "--length", "16")
    assert status == 0
    assert out.startswith("simulated on cuda: ")


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("siglip2", "Siglip2ForImageClassification"), ("wav2vec2", "Wav2Vec2ForCTC"), ("fnet", "FNetForMaskedLM")],
)
def test_what_cannot_be_simulated_names_the_closed_form(lingrad, tmp_path, kind, cls):
    """No inputs are known for the first; the second masks by the values of a tensor; the third cannot run in bfloat16."""
    path = written(tmp_path, kind, cls)
    status, _, errors = lingrad("memory", "simulate", "--model", path, "--rules", "svd(rank=16, clip=true)")
    assert status == 2
    assert "lingrad memory estimate gives the memory between steps in closed form and runs nothing" in errors
    assert "loss=" not in errors
    assert lingrad("memory", "estimate", "--model", path, "--rules", "svd(rank=16, clip=true)")[0] == 0


def written(folder, kind, cls):
    """The config of a model with one layer."""
    from transformers import AutoConfig

    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update({name: 1 for name in ("num_hidden_layers", "encoder_layers", "decoder_layers") if name in part})
    path = folder / f"{kind}.json"
    path.write_text(json.dumps({**config, "architectures": [cls]}))
    return path


@pytest.mark.parametrize(
    ("rules", "dtype"),
    [
        ("sumo(rank=8)", "bfloat16"),
        ("galore(rank=8, base=lion)", "float32"),
        ("q_galore(rank=8, rounding=compensated)", "int8"),
    ],
)
def test_a_method_is_estimated_with_its_own_base(rules, dtype):
    """Of INT8 weights what a compensated rounding keeps is counted too."""
    if dtype == "int8":
        pytest.importorskip("bitsandbytes")
    question = commands.Question(model="demo", rules=rules, dtype=dtype, length=16)
    estimated, simulated = commands.estimate(question), commands.simulate(question)
    assert estimated.totals["moments"] == simulated.steady_breakdown["moments"]
    assert estimated.totals["basis"] == simulated.steady_breakdown["basis"]


def test_a_basis_that_never_refreshes_is_compared_too():
    pytest.importorskip("galore_torch")
    labels = [method.label for method in commands.methods(commands.Question(model="demo", rules="finetune(rank=8)"))]
    assert labels[2:4] == ["optimizer mode, finetune(rank=8), adamw", "adapter mode, finetune(rank=8), adamw"]
    commands.simulate(
        commands.Question(model="demo", length=16),
        commands.methods(commands.Question(model="demo", rules="lora_fa(rank=8)"))[1],
    )
