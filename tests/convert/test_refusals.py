"""Folders that are not of one model, damaged or hostile: refused, and nothing is left."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lingrad import convert
from lingrad.errors import DataError, ExportError, LingradError, SpecError
from lingrad.files.tensorfile import TensorFile
from tests.support.folders import Malicious, copy, edit, make

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)


class TestRefused:
    """Nothing is written, nothing is overwritten, and the message names the first thing that is wrong."""

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        assert not (tmp_path / "out/adapter_config.json").exists()
        assert not list(tmp_path.glob(".out*/finished"))

    def refused(self, base, tuned, out, message, error=DataError):
        with pytest.raises(error, match=message):
            convert.convert(base, tuned, out)

    def test_paths(self, folders, tmp_path):
        base, tuned = folders
        (tmp_path / "out").mkdir()
        self.refused(base, tuned, tmp_path / "out", "'.*out' exists, and nothing is overwritten")
        assert not list((tmp_path / "out").iterdir())
        self.refused(base, base / ".." / base.name, tmp_path / "new", "START and TUNED are the same folder")
        self.refused(tmp_path / "none", tuned, tmp_path / "new", "'.*none' is not a model folder: there is no such folder")
        self.refused(tmp_path, tuned, tmp_path / "new", "is not a model folder: it has no config.json")
        self.refused(base, copy(base, tmp_path / "same"), tmp_path / "new", "has changed; there is nothing to", ExportError)

    def test_a_name_that_is_too_long(self, models, tmp_path):
        self.refused(*models, tmp_path / ("x" * 300), "cannot write '.*x': File name too long; name another folder")

    def test_weights_that_are_packed(self, folders, tmp_path):
        """Two codes in a byte: another shape than the config's, in both folders."""
        key = "model.layers.0.mlp.up_proj.weight"
        for folder, code in zip(folders, (1, 2), strict=True):
            edit(folder, lambda t, code=code: t.update({key: torch.full((1408, 1), code, dtype=torch.uint8)}))
        self.refused(*folders, tmp_path / "out", f"'{key}' is torch.uint8 in .* as for quantised weights")

    def test_one_folder_in_the_other(self, models, tmp_path):
        for out, decayed in (("a", "a"), ("a", "a/b"), ("a/b", "a")):
            with pytest.raises(SpecError, match="is inside the other; name separate folders"):
                convert.convert(*models, tmp_path / out, decayed_start=tmp_path / decayed)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "change", [lambda w: torch.cat([w, w]), lambda w: w[:5].clone(), lambda w: w.t().contiguous(), lambda w: w.view(-1)]
    )
    def test_weights_of_another_shape_than_the_config_says(self, folders, tmp_path, change):
        """In both folders alike: read as the config has it, rows would be others, and their residual would look well."""
        key = "model.layers.0.mlp.up_proj.weight"
        for folder in folders:
            edit(folder, lambda t: t.update({key: change(t[key])}))
        self.refused(*folders, tmp_path / "out", rf"'{key}' is \[.*\] in '.*tuned', and \[88, 32\] by its config")

    def test_another_architecture(self, models, tmp_path):
        _, other = make(tmp_path / "in", "gpt2")
        self.refused(models[0], other, tmp_path / "out", "the configs differ in 'architectures'|'model_type'")

    def test_another_config(self, folders, tmp_path):
        """What changes the function without changing a shape is not an adapter's to carry; what is only a default is."""
        config = json.loads((folders[1] / "config.json").read_text())
        (folders[1] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        self.refused(*folders, tmp_path / "out", "the configs differ in 'rms_norm_eps': 1e-06 in '.*base', 0.001 in '.*tuned'")
        harmless = {"use_cache": False, "attention_dropout": 0.5, "pad_token_id": 3}
        (folders[1] / "config.json").write_text(json.dumps(config | harmless))
        convert.convert(*folders, tmp_path / "fine")

    @pytest.mark.parametrize(
        "change",
        [
            {"problem_type": "single_label_classification"},  # by transformers, in the first forward with labels
            {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}},
            {"finetuning_task": "sst2"},
            {"unsloth_version": "2026.1", "made_by": {"a": 1}},  # by other programs
        ],
        ids=lambda change: next(iter(change)),
    )
    @pytest.mark.parametrize("which", [0, 1])
    def test_what_other_programs_note_in_a_config_is_passed_over_and_said(self, folders, tmp_path, change, which):
        config = json.loads((folders[which] / "config.json").read_text())
        (folders[which] / "config.json").write_text(json.dumps(config | change))
        report = convert.convert(*folders, tmp_path / "fine")
        assert any(
            all(key in note for key in change) and "about the task, or unknown to the model's class" in note
            for note in report.notes
        )

    @pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"is_causal": False}, {"quantization_config": {"bits": 4}}])
    def test_what_changes_the_function_is_not(self, folders, tmp_path, change):
        config = json.loads((folders[1] / "config.json").read_text())
        (folders[1] / "config.json").write_text(json.dumps(config | change))
        self.refused(*folders, tmp_path / "out", f"the configs differ in '{next(iter(change))}'|{next(iter(change))}|config")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: t.pop("model.norm.weight"),
                "not have the same tensors: only '.*base' has 'model.norm.weight' .missing",
            ),
            (lambda t: t.update(extra=torch.ones(3)), "only '.*tuned' has 'extra' .extra"),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(7)}),
                r"'model.norm.weight' is \[32\] in '.*base' and \[7\] in",
            ),
            (lambda t: t["model.norm.weight"].fill_(float("nan")), "'model.norm.weight' of TUNED has 32 elements that are NaN"),
            (
                lambda t: t["model.layers.0.mlp.up_proj.weight"][0, 0].fill_(float("inf")),
                "'model.layers.0.mlp.up_proj.weight' of TUNED has 1 elements that are NaN or infinite",
            ),
            (
                lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(88, 32, dtype=torch.int8)}),
                "'model.layers.0.mlp.up_proj.weight' is torch.int8 in .* as for quantised weights",
            ),
            (
                lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(88, 32, dtype=torch.uint8)}),
                "'model.layers.0.mlp.up_proj.weight' is torch.uint8 in .* as for quantised weights",
            ),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
                "'model.norm.weight' is torch.float8_e4m3fn in .* as for quantised weights",
            ),
        ],
    )
    def test_tensors(self, folders, tmp_path, change, message):
        edit(folders[1], change)
        self.refused(*folders, tmp_path / "out", message)

    def test_a_tensor_that_the_model_does_not_have(self, folders, tmp_path):
        for folder, value in zip(folders, (1.0, 2.0), strict=True):
            edit(folder, lambda t, value=value: t.update(extra=torch.full((3,), value)))
        self.refused(*folders, tmp_path / "out", "'extra' changed, and LlamaForCausalLM, .* has no such parameter", ExportError)

    @pytest.mark.parametrize("kept", [0, 4, 8, 100, 1000, -1])
    def test_cut_off(self, folders, tmp_path, kept):
        path = folders[1] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        self.refused(*folders, tmp_path / "out", "model.safetensors is truncated, damaged, or not a safetensors file")

    def test_a_shard_or_an_index_is_wrong(self, tmp_path):
        base, tuned = make(tmp_path / "in", sharded=True)
        index = tuned / "model.safetensors.index.json"
        good = index.read_text()
        first = json.loads(good)["weight_map"]["lm_head.weight"]
        for bad, message in (
            (good.replace(first, "../" + first), "expected safetensors files in the same folder"),
            (good.replace(first, "model.bin"), "expected safetensors files in the same folder"),
            (good.replace("lm_head.weight", "lm_head.wait"), "does not fit its files, first at 'lm_head.wait'"),
            (good[:-40], "cannot read .*index.json"),
            ("{}", "has no 'weight_map'"),
            ("[" * 100_000, "cannot read .*index.json"),
            (good.replace(first, "model\\u0000.safetensors"), "expected safetensors files in the same folder"),
        ):
            index.write_text(bad)
            self.refused(base, tuned, tmp_path / "out", message)
        index.write_text(good)
        (tuned / first).unlink()
        self.refused(base, tuned, tmp_path / "out", f"cannot read .*{first}: No such file")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
    def test_a_pickle_is_not_opened(self, folders, tmp_path, name):
        """It would make a file when it is loaded; that file is not there afterwards."""
        (folders[1] / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Malicious(tmp_path / "ran")}, folders[1] / name)
        self.refused(*folders, tmp_path / "out", f"only '{name}', a pickle, which could run code .* and is never read")
        assert not (tmp_path / "ran").exists()

    def test_the_malicious_file_would_work(self, tmp_path):
        """Loaded as others load it, the file of the test above does make a file, so that its absence says something."""
        torch.save(Malicious(tmp_path / "ran"), tmp_path / "model.pt")
        torch.load(tmp_path / "model.pt", weights_only=False)
        assert (tmp_path / "ran").exists()

    def test_code_beside_a_config_is_not_run(self, folders, tmp_path):
        config = json.loads((folders[1] / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        for folder in folders:
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
            (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        self.refused(*folders, tmp_path / "out", "holds no config that transformers")
        assert not (tmp_path / "ran").exists()


class TestTampered:
    """Every byte of a header changed in turn: refused, or it still describes the same bytes (a letter of a name, say)."""

    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, {"format": "pt"})
        return path

    def test_every_byte_of_the_header(self, file):
        good = file.read_bytes()
        size = 8 + int.from_bytes(good[:8], "little")
        refused = 0
        for i in range(size):
            for flipped in (good[i] ^ 1, good[i] ^ 0x10, 0):
                file.write_bytes(good[:i] + bytes([flipped]) + good[i + 1 :])
                try:
                    found = TensorFile(file)
                    assert sum(entry.nbytes for entry in found.entries.values()) == len(good) - size
                    for name in found.entries:
                        found.read(name)
                except LingradError:
                    refused += 1
        assert refused > 2 * size

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("[]", "its header is not a JSON object"),
            ("{", "its header is not JSON"),
            (
                '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
                "twice",
            ),
            (
                '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
                r"'a' is \[2\] torch.float32, and its offsets span 4 bytes",
            ),
            ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', r"shape and offsets of 'a' are \[-2\]"),
            ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "shape and offsets of 'a'"),
            ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', "shape and offsets of 'a'"),
            ('{"a":{"dtype":"F32","shape":[0,18446744073709551616],"data_offsets":[0,0]}}', "shape and offsets of 'a'"),
            ('{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}', "'a' has the dtype 'F33'; expected one of F64, F32"),
            ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "'a' begins at byte 4 of the data; expected 0"),
            ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "its header describes .* bytes, and the file is"),
            ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "its header describes .* bytes, and the file is"),
            (
                '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
                "'b' begins at byte 4 of the data; expected 8",
            ),
            ('{"a":{"dtype":"F32","shape":[2]}}', "'a' is not described by dtype, shape and data_offsets"),
            ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', "the offsets of 'a' are"),
            ('{"__metadata__":{"a":1}}', "the metadata in its header are not strings"),
        ],
    )
    def test_headers(self, tmp_path, header, message):
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
        with pytest.raises(DataError, match=message):
            TensorFile(path)

    def test_a_header_longer_than_memory(self, tmp_path):
        path = tmp_path / "x.safetensors"
        path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
        with pytest.raises(DataError, match="its header would be 4,611,686,018,427,387,904 bytes long, and the file is 10"):
            TensorFile(path)
