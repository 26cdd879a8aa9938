"""What llama.cpp's own converter makes of an exported adapter; needs its repository, named by the environment as LLAMA_CPP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lingrad
from lingrad import peft as bridge
from tests.support.models import gap, llama, text_batches, train

ROOT = Path(os.environ.get("LLAMA_CPP", "/nowhere"))
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not (ROOT / "convert_lora_to_gguf.py").is_file(), reason="LLAMA_CPP names no repository of llama.cpp"),
]
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
NAMES |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with ranks 2, 4 and 6 in float32, and the folder of its starting model."""
    start = tmp_path_factory.mktemp("start")
    llama(torch.float32).save_pretrained(start)
    model = llama(torch.float32)
    rules = {"*.0.self_attn.*": "svd(rank=2, every=2)", "*_proj": "svd(rank=4, every=0)", "*": "frozen"}
    opt = lingrad.adapt(model, rules, "adamw", lr=1e-2, ledger=True)
    train(model, opt, text_batches(6, micro=1))
    return opt, start


def converted(adapter, start, out):
    """The weights that llama.cpp has with an adapter, by its converter and the formula of src/llama-adapter.h."""
    import gguf

    command = [sys.executable, str(ROOT / "convert_lora_to_gguf.py"), str(adapter), "--base", str(start), "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    reader = gguf.GGUFReader(out)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    weights = dict(llama(torch.float32).named_parameters())
    for key in [key for key in tensors if key.endswith(".lora_b")]:
        _, layer, kind = key.removesuffix(".weight.lora_b").split(".")
        name = f"model.layers.{layer}.{NAMES[kind]}.weight"
        b, a = tensors[key], tensors[key.removesuffix("b") + "a"]
        delta = alpha / b.shape[1] * (b @ a)
        if kind in ("attn_q", "attn_k"):  # rows are in the order of llama.cpp's rotary embedding, half by half
            heads = 4 if kind == "attn_q" else 2
            delta = delta.reshape(heads, -1, 2, delta.shape[1]).swapaxes(1, 2).reshape(delta.shape)
        weights[name] = (weights[name] + delta).detach()
    return weights


def test_the_weights_are_those_of_the_run(run, tmp_path):
    opt, start = run
    bridge.export(opt, tmp_path / "a", start=start, target="llama.cpp", quiet=True)
    weights = converted(tmp_path / "a", start, tmp_path / "a.gguf")
    trained = opt.weights()
    assert gap({name: weights[name] for name in trained}, trained) <= 1e-6  # float32: a few roundings of 6e-8


def test_the_adapter_for_peft_gives_other_weights_in_silence(run, tmp_path):
    opt, start = run
    bridge.export(opt, tmp_path / "a", start=start, quiet=True)
    weights = converted(tmp_path / "a", start, tmp_path / "a.gguf")
    trained = opt.weights()
    assert gap({name: weights[name] for name in trained}, trained) > 1e-4


def test_what_check_adapter_calls_refused_is_refused(tmp_path, run):
    _, start = run
    model = llama(torch.float32)
    opt = lingrad.adapt(model, "svd(rank=4, every=0)", "adamw", lr=1e-2)
    train(model, opt, text_batches(2, micro=1))
    bridge.export(opt, tmp_path / "a", start=start, quiet=True)
    finding = bridge.check_adapter(tmp_path / "a").findings[1]
    assert finding.verdict == "refused"
    with pytest.raises(RuntimeError, match="Unexpected name '.*': Not a lora_A or lora_B tensor"):
        converted(tmp_path / "a", start, tmp_path / "a.gguf")
