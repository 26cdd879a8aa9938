"""Adapters merged into plain models, and the memory that takes."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from lingrad import convert
from lingrad.errors import CheckpointError, DataError
from tests.support.folders import Malicious, edit, left_over, make

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)


class TestMerge:
    @pytest.fixture
    def adapter(self, models, tmp_path):
        convert.convert(*models, tmp_path / "adapter", rank=2, allow_residual=1)
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
        with pytest.raises(DataError, match="is truncated, damaged, or not a safetensors file"):
            convert.merge(models[0], adapter, tmp_path / "new")
        path.unlink()
        torch.save(Malicious(tmp_path / "ran"), adapter / "adapter_model.bin")
        with pytest.raises(DataError, match="adapter_model.bin, a pickle"):
            convert.merge(models[0], adapter, tmp_path / "new")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("change", "option"),
        [
            ({"target_modules": ["q_proj"]}, "target_modules"),
            ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
            ({"exclude_modules": r".*\.0\..*"}, "exclude_modules"),
            ({"layers_to_transform": [1]}, "layers_to_transform"),
            ({"modules_to_save": ["mlp"]}, "modules_to_save"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_factors_that_peft_would_leave_out_are_refused(self, models, adapter, tmp_path, change, option):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=f"which {option} in its config leaves out, so that PEFT would not load them"):
            convert.merge(models[0], adapter, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
    )
    def test_a_base_of_integers_or_in_8_bits_is_refused(self, models, adapter, tmp_path, dtype):
        """Factors that are cast to integers are all zero: the base would be written, and be said to have the adapter in it."""
        from safetensors.torch import load_file, save_file

        start = shutil.copytree(models[0], tmp_path / "integers")
        weights = load_file(start / "model.safetensors")
        changed = {name: value.mul(99).to(dtype) if "proj" in name else value for name, value in weights.items()}
        save_file(changed, start / "model.safetensors", {"format": "pt"})
        with pytest.raises(DataError, match=r"proj\.weight' is stored as torch\.\w+, as in a quantised model"):
            convert.merge(start, adapter, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_full_disk_leaves_nothing(self, models, adapter, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(sys.modules["lingrad.convert.merge"].shutil, "copyfile", full)
        with pytest.raises(DataError, match="cannot write '.*new': .*No space left on device; nothing is left of it"):
            convert.merge(models[0], adapter, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        assert not left_over(tmp_path)

    def test_a_base_with_a_number_that_is_none(self, folders, adapter, tmp_path):
        edit(folders[0], lambda t: t["model.layers.0.mlp.up_proj.weight"][1].fill_(float("nan")))
        with pytest.raises(DataError, match="'model.layers.0.mlp.up_proj.weight' .* has elements that are not finite"):
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
convert.convert(small / "base", small / "tuned", out / "small", rank=4, allow_residual=1)  # what is loaded once
convert.merge(small / "base", out / "small", out / "small merged")
start = high()
convert.convert(big / "base", big / "tuned", out / "big")
middle = high()
convert.merge(big / "base", out / "big", out / "merged")
print(middle - start, high() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is read from /proc")  # noqa: PTH110
def test_memory_is_of_one_weight_not_of_the_model(tmp_path):
    """Two models of 90 MB whose largest weight has 4.3: above what a tiny conversion takes, converting needs less than 6 such
    weights, for blocks and factors in float64, merging less than 10; one model at once would be 21.

    The least of three runs: the high-water mark also counts pages of mapped files, which the kernel keeps for as long as it
    likes on a busy machine. What the conversion itself takes is in all three.
    """
    from tests.support.models import llama

    shape = {"hidden_size": 768, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 6}
    model = llama(torch.float32, **shape, num_key_value_heads=6)
    (tmp_path / "big").mkdir()
    model.save_pretrained(tmp_path / "big/base")
    from tests.support.folders import tune

    tune(model, rank=8).save_pretrained(tmp_path / "big/tuned")
    make(tmp_path / "small")
    sizes = [param.numel() * 4 for param in model.parameters()]
    peaks = []
    for i in range(3):
        out = tmp_path / f"out{i}"
        out.mkdir()
        arguments = [str(tmp_path / "small"), str(tmp_path / "big"), str(out)]
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=300
        )
        peaks.append(tuple(map(int, run.stdout.split())))
        converting, both = map(min, zip(*peaks, strict=True))
        if converting <= 6 * max(sizes) and both <= 10 * max(sizes):
            break
    assert sum(sizes) > 20 * max(sizes)
    assert converting <= 6 * max(sizes), f"{converting:,} of {sum(sizes):,}"
    assert both <= 10 * max(sizes), f"{both:,} of {sum(sizes):,}"
