"""Conversions that are killed, interrupted, refused; files that are cut off, tampered with or hostile; memory."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import save_file

from lingrad import convert
from lingrad.convert import jobs
from lingrad.errors import CheckpointError, DataError, ExportError, LingradError, SpecError
from lingrad.tensorfile import TensorFile
from tests.folders import Malicious, contents, copy, edit, left_over, make

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folders(models, tmp_path):
    """Copies that a test may spoil."""
    return [copy(folder, tmp_path / "in" / folder.name) for folder in models]


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """The files of an uninterrupted conversion. Paths are part of a config, so that all conversions use the same."""
    out = tmp_path_factory.mktemp("expected") / "out"
    convert.convert(*models, out)
    return contents(out)


class Stop(Exception):
    pass


def stop_after(count):
    def tick(done, total, name):
        if done == count:
            raise Stop

    return tick


class TestResume:
    def test_finished_modules_are_not_computed_again(self, models, expected, tmp_path, monkeypatch):
        asked = []
        real = jobs._find
        monkeypatch.setattr(jobs, "_find", lambda pair, **rest: asked.append(pair.name) or real(pair, **rest))
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(8))
        assert not (tmp_path / "out").exists()
        assert left_over(tmp_path) == [".out.partial"]
        assert len(asked) == 8
        convert.convert(*models, tmp_path / "out")
        assert len(set(asked)) == len(asked) == 21
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)

    def test_a_part_that_is_not_whole_is_computed_again(self, models, expected, tmp_path):
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(8))
        parts = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
        for i, part in enumerate(parts[:4]):
            whole = part.read_bytes()
            part.write_bytes(whole[: len(whole) // 2] if i % 2 else b"")
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected

    @pytest.mark.parametrize("stage", ["write_adapter", "check_structure", "publish"])
    def test_a_failure_at_the_end(self, models, expected, tmp_path, monkeypatch, stage):
        """While the adapter is written, checked or given its name: nothing looks complete, and the next call goes on."""

        def fail(*_, **__):
            raise Stop

        module = {"write_adapter": convert.writing, "check_structure": convert.verify, "publish": jobs}[stage]
        with monkeypatch.context() as patch:
            patch.setattr(module, stage, fail)
            with pytest.raises(Stop):
                convert.convert(*models, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(jobs, "_find", fail)
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected

    @pytest.mark.parametrize(
        ("options", "key"), [({"rank": 3}, "goal"), ({"dtype": "bf16"}, "dtype"), ({"full_svd": True}, "full_svd")]
    )
    def test_work_of_another_conversion_is_refused(self, models, tmp_path, options, key):
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(3))
        before = contents(tmp_path)
        with pytest.raises(
            DataError, match=rf"unfinished work of another conversion, which differs in '{key}'.* remove '.*\.out"
        ):
            convert.convert(*models, tmp_path / "out", **options)
        assert contents(tmp_path) == before

    def test_inputs_that_changed_meanwhile_are_refused(self, folders, tmp_path):
        with pytest.raises(Stop):
            convert.convert(*folders, tmp_path / "out", tick=stop_after(3))
        edit(folders[1], lambda t: t["model.norm.weight"].add_(1))
        with pytest.raises(DataError, match="which differs in 'tuned files'"):
            convert.convert(*folders, tmp_path / "out")

    def test_a_full_disk(self, models, expected, tmp_path, monkeypatch):
        """The error is one sentence; what was finished stays, and the same command ends with the same bytes."""
        real, written = os.fdopen, []

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, data):
                written.append(len(data))
                if len(written) > 20:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.file.write(data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdopen", lambda *args: Full(real(*args)))
            with pytest.raises(DataError, match=r"cannot write '.*out': .*No space left on device; what was finished is kept"):
                convert.convert(*models, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not [path for path in (tmp_path / ".out.partial").iterdir() if path.name.startswith(".")]
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected

    def test_kill(self, models, expected, tmp_path):
        """SIGKILL as soon as the first part is there, then the same command: the same bytes."""
        program = textwrap.dedent(
            """
            import sys, time
            from lingrad import convert
            wait = float(sys.argv[4])
            convert.convert(*sys.argv[1:4], tick=lambda *_: time.sleep(wait))
            """
        )
        command = [sys.executable, "-W", "ignore", "-c", program, *map(str, models), str(tmp_path / "out")]
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        running = subprocess.Popen([*command, "0.2"], env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.partial/*.safetensors")):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (tmp_path / "out").exists()
        assert 1 <= len(list(tmp_path.glob(".out.partial/*.safetensors"))) < 21
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)


class TestTwoAtOnce:
    def test_the_second_is_refused_and_the_first_is_not_disturbed(self, models, expected, tmp_path):
        refused = []

        def tick(done, total, name):
            if done in (1, total):
                with pytest.raises(DataError, match="another process is writing '.*out' now") as caught:
                    convert.convert(*models, tmp_path / "out")
                refused.append(caught)

        convert.convert(*models, tmp_path / "out", tick=tick)
        assert len(refused) == 2
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)

    def test_what_is_not_ours_stays(self, models, expected, tmp_path):
        """A folder that happens to have the name of the hidden one is not taken; what a kill left of ours is cleared away."""
        hidden = tmp_path / ".out.partial"
        hidden.mkdir()
        (hidden / "notes.txt").write_text("mine")
        with pytest.raises(DataError, match="holds 'notes.txt', which is none; move it"):
            convert.convert(*models, tmp_path / "out")
        assert contents(hidden) == {"notes.txt": b"mine"}
        (hidden / "notes.txt").unlink()
        (hidden / "finished").mkdir()
        for name in (".manifest.json.abc", "00003.safetensors", ".00004.safetensors.x1", "finished/adapter_config.json"):
            (hidden / name).write_bytes(b"left")
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)

    def test_a_folder_that_came_meanwhile(self, models, tmp_path):
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(2))
        (tmp_path / "out").mkdir()
        with pytest.raises(DataError, match="exists, and nothing is overwritten"):
            jobs.Parts(tmp_path / "out", {})
        assert len(contents(tmp_path / ".out.partial")) == 4  # manifest, lock, two parts


def test_the_name_of_a_model_known_by_name(models, tmp_path, monkeypatch):
    """A folder `demo` is that folder."""
    copy(models[0], tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    convert.convert("demo", models[1], "out")
    convert.merge("demo", "out", "merged")
    assert not left_over(tmp_path)


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
        self.refused(base, base / ".." / base.name, tmp_path / "new", "BASE and TUNED are the same folder")
        self.refused(tmp_path / "none", tuned, tmp_path / "new", "'.*none' is no model folder: there is no such folder")
        self.refused(tmp_path, tuned, tmp_path / "new", "is no model folder: it has no config.json")
        self.refused(base, copy(base, tmp_path / "same"), tmp_path / "new", "has changed; there is nothing to", ExportError)

    def test_a_name_that_is_too_long(self, models, tmp_path):
        self.refused(*models, tmp_path / ("x" * 300), "cannot write '.*x': File name too long; name another folder")

    def test_weights_that_are_packed(self, folders, tmp_path):
        """Two codes in a byte: another shape than the config's, in both folders."""
        key = "model.layers.0.mlp.up_proj.weight"
        for folder, code in zip(folders, (1, 2), strict=True):
            edit(folder, lambda t, code=code: t.update({key: torch.full((1408, 1), code, dtype=torch.uint8)}))
        self.refused(*folders, tmp_path / "out", f"'{key}' is torch.uint8 in .* as of quantised weights")

    def test_one_folder_in_the_other(self, models, tmp_path):
        for out, decayed in (("a", "a"), ("a", "a/b"), ("a/b", "a")):
            with pytest.raises(SpecError, match="lie one in the other"):
                convert.convert(*models, tmp_path / out, decayed_base=tmp_path / decayed)
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
        ("change", "message"),
        [
            (
                lambda t: t.pop("model.norm.weight"),
                "not have the same tensors: only '.*base' holds 'model.norm.weight' .missing",
            ),
            (lambda t: t.update(extra=torch.ones(3)), "only '.*tuned' holds 'extra' .extra"),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(7)}),
                r"'model.norm.weight' is \[32\] in '.*base' and \[7\] in",
            ),
            (lambda t: t["model.norm.weight"].fill_(float("nan")), "'model.norm.weight' of TUNED has 32 numbers that are NaN"),
            (
                lambda t: t["model.layers.0.mlp.up_proj.weight"][0, 0].fill_(float("inf")),
                "'model.layers.0.mlp.up_proj.weight' of TUNED has 1 numbers that are NaN or infinite",
            ),
            (
                lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(88, 32, dtype=torch.int8)}),
                "'model.layers.0.mlp.up_proj.weight' is torch.int8 in .* as of quantised weights",
            ),
            (
                lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(88, 32, dtype=torch.uint8)}),
                "'model.layers.0.mlp.up_proj.weight' is torch.uint8 in .* as of quantised weights",
            ),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
                "'model.norm.weight' is torch.float8_e4m3fn in .* as of quantised weights",
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
        self.refused(*folders, tmp_path / "out", "model.safetensors is cut off, damaged, or no safetensors file")

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
            ("[]", "its header is no JSON object"),
            ("{", "its header is no JSON"),
            (
                '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
                "twice",
            ),
            (
                '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
                r"'a' is \[2\] torch.float32, and its place holds 4 bytes",
            ),
            ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', r"shape and place of 'a' are \[-2\]"),
            ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "shape and place of 'a'"),
            ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', "shape and place of 'a'"),
            ('{"a":{"dtype":"F32","shape":[0,18446744073709551616],"data_offsets":[0,0]}}', "shape and place of 'a'"),
            ('{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}', "'a' has the dtype 'F33'; expected one of F64, F32"),
            ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "'a' begins at byte 4 of the data; expected 0"),
            ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "its header describes .* bytes, and the file is"),
            ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "its header describes .* bytes, and the file is"),
            (
                '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
                "'b' begins at byte 4 of the data; expected 8",
            ),
            ('{"a":{"dtype":"F32","shape":[2]}}', "'a' is not described by dtype, shape and data_offsets"),
            ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', "the place of 'a' is"),
            ('{"__metadata__":{"a":1}}', "the metadata of its header are not texts"),
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


class TestMerge:
    @pytest.fixture
    def adapter(self, models, tmp_path):
        convert.convert(*models, tmp_path / "adapter", rank=2)
        return tmp_path / "adapter"

    def test_paths(self, models, adapter, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(DataError, match="exists, and nothing is overwritten"):
            convert.merge(models[0], adapter, tmp_path / "out")
        with pytest.raises(DataError, match=r"cannot read|no adapter|adapter_config"):
            convert.merge(models[0], tmp_path / "none", tmp_path / "new")

    def test_another_base(self, adapter, tmp_path):
        base, _ = make(tmp_path / "in", "gpt2")
        with pytest.raises(CheckpointError):
            convert.merge(base, adapter, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        assert not left_over(tmp_path)

    def test_damaged(self, models, adapter, tmp_path):
        path = adapter / "adapter_model.safetensors"
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(DataError, match="is cut off, damaged, or no safetensors file"):
            convert.merge(models[0], adapter, tmp_path / "new")
        path.unlink()
        torch.save(Malicious(tmp_path / "ran"), adapter / "adapter_model.bin")
        with pytest.raises(DataError, match="adapter_model.bin, a pickle"):
            convert.merge(models[0], adapter, tmp_path / "new")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "new").exists()

    def test_a_full_disk_leaves_nothing(self, models, adapter, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(convert.merging.shutil, "copyfile", full)
        with pytest.raises(DataError, match="cannot write '.*new': .*No space left on device; nothing is left of it"):
            convert.merge(models[0], adapter, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        assert not left_over(tmp_path)

    def test_a_base_with_a_number_that_is_none(self, folders, adapter, tmp_path):
        edit(folders[0], lambda t: t["model.layers.0.mlp.up_proj.weight"][1].fill_(float("nan")))
        with pytest.raises(DataError, match="'model.layers.0.mlp.up_proj.weight' .* has numbers that are not finite"):
            convert.merge(folders[0], adapter, tmp_path / "new")
        assert not left_over(tmp_path)


MEASURE = """
import sys
from pathlib import Path
import peft, torch, transformers
from lingrad import convert
torch.set_num_threads(1)

def high():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])

small, big, out = map(Path, sys.argv[1:])
convert.convert(small / "base", small / "tuned", out / "small", rank=4)  # what is loaded once
convert.merge(small / "base", out / "small", out / "small merged")
start = high()
convert.convert(big / "base", big / "tuned", out / "big")
middle = high()
convert.merge(big / "base", out / "big", out / "merged")
print(middle - start, high() - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is read from /proc")  # noqa: PTH110
def test_memory_is_of_one_weight_not_of_the_model(tmp_path):
    """Two models of 90 MB whose largest weight has 4.3: above what a tiny conversion takes, converting needs less than 6 such
    weights, for blocks and factors in float64, merging less than 10; one model at once would be 21."""
    from tests.training import llama

    shape = {"hidden_size": 768, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 6}
    model = llama(torch.float32, **shape, num_key_value_heads=6)
    (tmp_path / "big").mkdir()
    model.save_pretrained(tmp_path / "big/base")
    from tests.folders import tune

    tune(model, rank=8).save_pretrained(tmp_path / "big/tuned")
    make(tmp_path / "small")
    sizes = [param.numel() * 4 for param in model.parameters()]
    arguments = [str(tmp_path / "small"), str(tmp_path / "big"), str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    converting, both = map(int, run.stdout.split())
    assert sum(sizes) > 20 * max(sizes)
    assert converting <= 6 * max(sizes), f"{converting:,} of {sum(sizes):,}"
    assert both <= 10 * max(sizes), f"{both:,} of {sum(sizes):,}"
