"""`lingrad convert` and `lingrad merge` on folders of tiny models: every kind, what is found, what PEFT makes of it."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model

from lingrad import __main__, convert
from lingrad.convert import output
from lingrad.convert.logits import outputs_of
from lingrad.errors import CheckpointError, ExportError, SpecError
from lingrad.files.tensorfile import TensorFile
from lingrad.models import load_model
from tests.support.folders import BUILD, contents, edit, is_wide, left_over, make, tune

peft = pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)

FP32, BF16 = torch.float32, torch.bfloat16
KINDS = [(kind, FP32, sharded) for kind in BUILD for sharded in (False, True)]
KINDS += [(kind, BF16, False) for kind in BUILD] + [("llama", torch.float64, False), ("llama", torch.float16, True)]


def merged(base, adapter):
    """The weights of PEFT's own merge."""
    return peft.PeftModel.from_pretrained(load_model(base), str(adapter)).merge_and_unload().state_dict()


def through_peft(base, adapter):
    return outputs_of(peft.PeftModel.from_pretrained(load_model(base), str(adapter)).eval())["logits"]


def rows(report, kind="low_rank"):
    return {row.name: row for row in report.rows if row.kind == kind}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("kind", "dtype", "sharded"), KINDS)
def test_every_kind_of_model(tmp_path, kind, dtype, sharded):
    """The rank that went in is found; PEFT loads the adapter and has the tuned weights, to the rounding of their dtype."""
    base, tuned = make(tmp_path, kind, dtype, sharded=sharded, size=1e-2 if dtype.itemsize > 2 else 0.5)
    assert ("model.safetensors" in contents(base)) is not sharded
    report = convert.convert(base, tuned, tmp_path / "out")
    start, theirs = load_model(base), load_model(tuned).state_dict()
    wide = {name for name, param in start.named_parameters() if is_wide(name, param)}
    assert rows(report).keys() == wide
    assert {row.rank for row in rows(report).values()} == {5}
    assert report.equal == 0
    assert not report.notes
    eps = torch.finfo(dtype).eps
    assert report.residual <= (1e-5 if dtype == FP32 else 20 * eps)
    ours = merged(base, tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        if name not in wide:
            assert torch.equal(ours[name], weight), name
        else:  # TUNED was rounded once, W + B A is rounded once, and so is B A: each by half an ulp of the largest; in
            # float64 the factors themselves are of that precision, and their rounding is 10 times as much
            allowed = (50 if dtype == torch.float64 else 2) * eps * weight.abs().max()
            assert (ours[name].double() - weight.double()).abs().max() <= allowed, name
    expected = outputs_of(load_model(tuned).eval())["logits"]
    assert (through_peft(base, tmp_path / "out") - expected).abs().max() <= 20 * eps * expected.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_did_not_change_is_left_out(tmp_path, kind):
    base, tuned = make(tmp_path, kind, others=False, wide=lambda name, param: is_wide(name, param) and ".1." in name)
    report = convert.convert(base, tuned, tmp_path / "out")
    held = TensorFile(tmp_path / "out/adapter_model.safetensors").entries
    assert held
    assert all(".1." in name for name in held)
    assert len(report.rows) == len(held) // 2
    assert report.equal == len(load_model(base).state_dict()) - len(report.rows) - (kind == "gpt2")  # whose head is tied


def test_the_report_says_what_the_file_does(tmp_path):
    """Residuals against dense matrices in float64, from the files alone; the table and the JSON have the same figures."""
    base, tuned = make(tmp_path, "gpt2")
    report = convert.convert(base, tuned, tmp_path / "out", rank=3, allow_residual=1, logits=True)
    adapter = TensorFile(tmp_path / "out/adapter_model.safetensors")
    start, end = (load_model(path).state_dict() for path in (base, tuned))
    lost = total = 0.0
    for name, row in rows(report).items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter.read(f"{key}.lora_{factor}.weight").double() for factor in "AB")
        change = end[name].double() - start[name].double()
        left = (change - (b @ a).T).norm()  # a Conv1D
        assert row.residual == pytest.approx(float(left / change.norm()), rel=1e-9)
        assert row.rank == a.shape[0] == 3
        lost, total = lost + left**2, total + change.norm() ** 2
    assert report.residual == pytest.approx(float((lost / total) ** 0.5), rel=1e-9)
    difference = (through_peft(base, tmp_path / "out") - outputs_of(load_model(tuned).eval())["logits"]).abs().max()
    assert report.outputs.difference == pytest.approx(float(difference), rel=1e-3)
    written = json.loads((tmp_path / "out/lingrad_report.json").read_text())
    assert written["residual"] == report.residual
    assert [row["residual"] for row in written["rows"]] == [row.residual for row in report.rows]
    assert f"{report.residual:.1e}" in report.table()
    assert report.nbytes == (tmp_path / "out/adapter_model.safetensors").stat().st_size
    line = next(line for line in report.table().splitlines() if line.startswith("transformer.h.*.mlp.c_fc.weight (x 2)"))
    assert line.split()[3:7] == ["32", "x", "128", "3"]


class TestGoals:
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        return make(tmp_path_factory.mktemp("models"), rank=10, others=False)

    @pytest.mark.parametrize(("goal", "lost"), [({"energy": 0.9}, 0.1**0.5), ({"max_error": 0.2}, 0.2)])
    def test_energy_and_error_hold_for_each_weight(self, folders, tmp_path, goal, lost):
        found = rows(convert.convert(*folders, tmp_path / "out", **goal))
        assert all(lost / 3 < row.residual <= lost for row in found.values())
        assert all(row.rank < 10 for row in found.values())

    def test_full_svd_is_the_best_there_is(self, folders, tmp_path):
        best = rows(convert.convert(*folders, tmp_path / "best", rank=4, allow_residual=1, full_svd=True))
        found = rows(convert.convert(*folders, tmp_path / "found", rank=4, allow_residual=1))
        for name, row in found.items():
            assert best[name].residual * (1 - 1e-6) <= row.residual <= 1.02 * best[name].residual

    def test_one_rank_for_all(self, tmp_path):
        """The largest that one needs, zeros beyond a weight's own: the same change, and a config without exceptions."""
        base, tuned = make(tmp_path, rank=3, others=False)
        edit(tuned, lambda t: t["model.layers.0.mlp.up_proj.weight"].add_(torch.randn(88, 7) @ torch.randn(7, 32) / 10))
        plain = convert.convert(base, tuned, tmp_path / "plain")
        report = convert.convert(base, tuned, tmp_path / "out", uniform_rank=True)
        assert {row.rank for row in rows(plain).values()} == {3, 10}
        assert {row.rank for row in rows(report).values()} == {10}
        assert [row.residual for row in report.rows] == pytest.approx([row.residual for row in plain.rows], rel=1e-9)
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert (config["r"], config["rank_pattern"]) == (10, {})

    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
    def test_factors_in_another_dtype(self, folders, tmp_path, dtype):
        report = convert.convert(*folders, tmp_path / "out", dtype=dtype)
        held = {entry.dtype for entry in TensorFile(tmp_path / "out/adapter_model.safetensors").entries.values()}
        assert held == {output.DTYPES[dtype]}
        eps = torch.finfo(output.DTYPES[dtype]).eps
        assert report.residual <= max(eps, 1e-5)
        if dtype != "fp64":
            assert report.residual >= eps / 10  # the rounding of the factors is in the figure

    def test_an_error_that_the_dtype_cannot_reach(self, folders, tmp_path):
        with pytest.raises(ExportError, match=r"factors in torch.bfloat16 leave .* write them in fp32"):
            convert.convert(*folders, tmp_path / "out", dtype="bf16", max_error=1e-3)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 3, "energy": 0.9}, "rank and energy are different goals"),
            ({"rank": 2.5}, "rank must be a whole number, at least 1, not 2.5"),
            ({"max_error": 1e-200}, "max_error must be at least 1e-15"),
            ({"energy": float("nan")}, "energy must lie between 0 and 1, not nan"),
            ({"dtype": "int8"}, "dtype must be one of fp32, .* not 'int8'"),
            ({"rank": 3, "decayed_start": "x"}, "decayed_start needs all of a change"),
        ],
    )
    def test_refused(self, folders, tmp_path, options, message):
        with pytest.raises(SpecError, match=message):
            convert.convert(*folders, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())


class TestDecay:
    def test_it_is_reported_as_what_it_is(self, tmp_path):
        """PEFT adds to the whole base, so what was decayed stays in the residual: (1 - kept) |START| of the change."""
        base, tuned = make(tmp_path, kept=0.97, others=False)
        report = convert.convert(base, tuned, tmp_path / "out", allow_residual=1)
        start, end = (load_model(path).state_dict() for path in (base, tuned))
        for name, row in rows(report).items():
            assert row.rank == 5
            assert row.decay == pytest.approx(0.97, abs=1e-6)
            assert row.without_decay <= 1e-5
            decayed = 0.03 * start[name].double().norm() / (end[name].double() - start[name].double()).norm()
            assert row.residual == pytest.approx(float(decayed), rel=1e-3)
        (note,) = report.notes
        assert "14 of 14 low-rank weights are decay * START + low rank, decay being 0.97." in note
        assert note in report.table()
        assert note in json.loads((tmp_path / "out/lingrad_report.json").read_text())["notes"]

    def test_a_base_with_its_decay_applied(self, tmp_path):
        base, tuned = make(tmp_path, kept=0.97, others=False, sharded=True)
        report = convert.convert(base, tuned, tmp_path / "out", decayed_start=tmp_path / "decayed", logits=True)
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "decayed")
        assert report.outputs.difference <= 1e-6 * report.outputs.largest
        assert contents(tmp_path / "decayed").keys() == contents(base).keys()
        ours, theirs = merged(tmp_path / "decayed", tmp_path / "out"), load_model(tuned).state_dict()
        assert all((ours[name] - theirs[name]).abs().max() <= 4e-7 * theirs[name].abs().max() for name in theirs)

    def test_a_base_that_did_not_decay(self, tmp_path):
        with pytest.raises(ExportError, match="no decoupled decay was recognised"):
            convert.convert(*make(tmp_path), tmp_path / "out", decayed_start=tmp_path / "decayed")
        assert not (tmp_path / "decayed").exists()
        assert not (tmp_path / "out").exists()

    def test_a_failure_after_it_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(*_):
            raise ExportError("asked to")

        monkeypatch.setattr(convert.writing.verify, "check_structure", fail)
        with pytest.raises(ExportError, match="asked to"):
            convert.convert(*make(tmp_path, kept=0.97, others=False), tmp_path / "out", decayed_start=tmp_path / "decayed")
        assert not (tmp_path / "decayed").exists()
        assert not (tmp_path / "out").exists()


def test_a_change_of_full_rank_is_said_to_be_one(tmp_path):
    base, tuned = make(tmp_path, rank=88, others=False)
    report = convert.convert(base, tuned, tmp_path / "out")
    assert all(row.full_rank and row.residual <= 1e-6 for row in report.rows)
    note, larger, *scales = report.notes
    assert note.startswith("14 of 14 weights changed by a matrix of full rank")
    assert larger.startswith("The adapter is larger than the model")
    # square weights have another full rank than the others
    assert [scale.split()[0] for scale in scales] == ["llama.cpp", "diffusers"]


@pytest.mark.parametrize("kind", ["a decoder beside", "few positions", "images"])
def test_logits_of_models_that_read_otherwise(tmp_path, kind):
    """An encoder with a decoder gets tokens for both, a short model fewer, a model of images images."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "a decoder beside":
        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        model = transformers.T5ForConditionalGeneration(config)
    elif kind == "few positions":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=64, max_position_embeddings=8, **sizes))
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
    for name in ("base", "tuned"):
        tune(model, 2, others=False, wide=lambda _, param: param.dim() == 2 and min(param.shape) >= 32 and len(param) < 64)
        model.save_pretrained(tmp_path / name)
        save_model(model, tmp_path / name / "model.safetensors")  # transformers' own names for images are others
    report = convert.convert(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", logits=True)
    assert report.outputs.inputs == ("random pixel_values" if kind == "images" else "2 x 16 random token ids")
    assert report.outputs.difference <= 1e-4 * report.outputs.largest


def test_logits_that_are_no_numbers_are_not_taken_for_equal(tmp_path):
    folders = make(tmp_path, "llama", others=False)
    for folder in folders:
        edit(folder, lambda t: t.update({"model.norm.weight": torch.full_like(t["model.norm.weight"], 3e38)}))
    with pytest.raises(ExportError, match="compared, on 2 x 16 random token ids they are NaN in .logits.; leave"):
        convert.convert(*folders, tmp_path / "out", logits=True)
    convert.convert(*folders, tmp_path / "out")


@pytest.mark.parametrize("tied", ["base", "tuned"])
def test_a_tied_head_may_be_stored_or_not(tmp_path, tied):
    """One program leaves it out, another writes it twice."""
    folders = dict(zip(("base", "tuned"), make(tmp_path, "tied llama", others=False), strict=True))
    edit(folders[tied], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    report = convert.convert(folders["base"], folders["tuned"], tmp_path / "out")
    assert {row.rank for row in report.rows} == {5}


class TestMerge:
    @pytest.mark.thinned(3)
    @pytest.mark.parametrize(("kind", "dtype", "sharded"), KINDS)
    def test_it_is_what_peft_merges_to_the_bit(self, tmp_path, kind, dtype, sharded):
        """In every dtype, and the folder is like the base's: files, index, config."""
        base, tuned = make(tmp_path, kind, dtype, sharded=sharded, size=0.1)
        (base / "tokenizer.json").write_text("{}")
        (base / "pytorch_model.bin").write_bytes(b"weights in another form")
        convert.convert(base, tuned, tmp_path / "adapter", rank=4, allow_residual=1)
        out = convert.merge(base, tmp_path / "adapter", tmp_path / "out")
        assert contents(out).keys() == contents(base).keys() - {"pytorch_model.bin"}
        if sharded:
            assert contents(out)["model.safetensors.index.json"] == contents(base)["model.safetensors.index.json"]
        ours, theirs = load_model(out).state_dict(), merged(base, tmp_path / "adapter")
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name
            assert ours[name].dtype == theirs[name].dtype
        assert not left_over(tmp_path)

    @pytest.mark.parametrize(
        ("saved", "ties"),
        [(["lm_head"], False), (["embed_tokens"], False), (["embed_tokens", "lm_head"], False), (["lm_head"], True)],
    )
    def test_a_head_that_is_tied(self, tmp_path, saved, ties):
        """PEFT gives a module saved whole a copy of its own: what then is no plain model any more is refused."""
        base, _ = make(tmp_path, "tied llama")
        options = {"modules_to_save": saved, "ensure_weight_tying": ties, "task_type": "CAUSAL_LM"}
        adapted = peft.get_peft_model(load_model(base), peft.LoraConfig(target_modules=["q_proj"], r=2, **options))
        generator = torch.Generator().manual_seed(0)
        for param in adapted.parameters():
            if param.requires_grad:
                param.data.add_(0.1 * torch.randn(param.shape, generator=generator))
        adapted.save_pretrained(tmp_path / "adapter")
        if not ties:
            with pytest.raises(CheckpointError, match=r"are one tensor in the model, .* ensure_weight_tying=True"):
                convert.merge(base, tmp_path / "adapter", tmp_path / "out")
            return
        convert.merge(base, tmp_path / "adapter", tmp_path / "out")
        expected = through_peft(base, tmp_path / "adapter")
        assert (outputs_of(load_model(tmp_path / "out"))["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_there_and_back(self, tmp_path):
        """convert, merge, convert: the second finds the factors of the first again."""
        base, tuned = make(tmp_path, others=False)
        convert.convert(base, tuned, tmp_path / "adapter", rank=3, allow_residual=1)
        convert.merge(base, tmp_path / "adapter", tmp_path / "merged")
        again = convert.convert(base, tmp_path / "merged", tmp_path / "again")
        assert {row.rank for row in again.rows} == {3}
        assert again.residual <= 1e-6


def test_commands_on_the_page_run(tmp_path, monkeypatch, capsys):
    """docs/convert.md, its shell lines in their order, on tiny models in the places they name."""
    page = (Path(__file__).parents[2] / "docs/convert.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines() if line]
    assert len(commands) >= 5
    base, tuned = make(tmp_path, kept=0.9995)  # 1% of the change; more would have to be allowed
    base.rename(tmp_path / "START")
    tuned.rename(tmp_path / "TUNED")
    _ledger_run(tmp_path / "START", tmp_path / "RUN")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        out, errors = capsys.readouterr()
        assert not caught.value.code, command + errors
        assert "Written: " in out
    made = {"LORA", "SMALL", "DECAYED", "DECAYED-LORA", "EXACT", "MERGED"}
    assert {folder.name for folder in tmp_path.iterdir()} == made | {"START", "TUNED", "RUN"}


def _ledger_run(base, out):
    import lingrad
    from tests.support.models import text_batches, train

    model = load_model(base)
    optimizer = lingrad.wrap(model, "svd(rank=4, every=3)", lr=1e-2, ledger=True)
    train(model, optimizer, text_batches(5))
    model.save_pretrained(out)
    torch.save(optimizer.state_dict(), out / "optimizer.pt")


def test_python_on_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, tuned = make(tmp_path)
    base.rename("START")
    tuned.rename("TUNED")
    page = (Path(__file__).parents[2] / "docs/convert.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    exec(compile(blocks[0], "docs/convert.md", "exec"), {})  # noqa: S102 - our own text
    assert (tmp_path / "MERGED/model.safetensors").exists()


def test_tune_is_what_it_says(tmp_path):
    """The made-up training has the rank it is given, so that the tests above look for what is there."""
    from tests.support.models import llama

    start, end = llama(torch.float64), tune(llama(torch.float64), rank=5)
    for (name, was), now in zip(start.named_parameters(), end.parameters(), strict=True):
        if is_wide(name, was):
            assert torch.linalg.matrix_rank((now - was).detach(), rtol=1e-10) == 5
