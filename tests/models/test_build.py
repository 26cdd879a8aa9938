"""Models from a folder: nothing of the folder is run, and nobody is asked whether it may be."""

import builtins
import contextlib
import json

import pytest
import torch

from lingrad.errors import DataError
from lingrad.models import load_model, open_model, read_config

transformers = pytest.importorskip("transformers", reason="make test installs it (extra: hf)")

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64}


@pytest.fixture
def asked(monkeypatch):
    """Every question is answered with yes, as by a script that pipes it; those that were asked."""
    questions = []

    def yes(prompt=""):
        questions.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", yes)
    return questions


def hostile(path, config, kind="GPT2LMHeadModel"):
    """A folder with a Python file that leaves a trace if it is run."""
    path.mkdir()
    ran = path.parent / "RAN"
    (path / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import {kind} as Evil, GPT2Config as EvilConfig\n"
    )
    (path / "config.json").write_text(json.dumps(config))
    return ran


EVERY = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
PLAIN = {
    "known class": GPT2 | {"auto_map": EVERY},
    "unknown class": GPT2 | {"auto_map": EVERY, "architectures": ["Nope"]},
    "no class": {key: value for key, value in GPT2.items() if key != "architectures"} | {"auto_map": EVERY},
    "unknown type": GPT2 | {"auto_map": EVERY, "model_type": "evil"},
    "no native model": {"model_type": "clap_text_model", "architectures": ["Nope"], "auto_map": {"AutoModel": "evil.Evil"}},
    "a path as a class": GPT2 | {"auto_map": {"AutoModel": "other--evil.Evil"}, "architectures": ["Nope"]},
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("read", [open_model, load_model, read_config], ids=lambda f: f.__name__)
def test_the_code_of_a_folder_is_not_run(tmp_path, asked, kind, read):
    ran = hostile(tmp_path / "model", PLAIN[kind])
    try:
        found = read(str(tmp_path / "model") if read is open_model else tmp_path / "model")
        assert "evil" not in type(found).__module__
    except (DataError, ValueError, OSError):  # it has no weights, or transformers has no class for it
        pass
    assert not ran.exists()
    assert asked == []


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_nor_that_of_a_model_inside_another(tmp_path, asked, where):
    evil = tmp_path / "evil"
    ran = hostile(evil, {}, "ClapTextModel")
    part = {"model_type": "clap_text_model", "auto_map": {"AutoModel": "evil.Evil"}, "_name_or_path": str(evil)}
    parts = {"encoder": GPT2, "decoder": GPT2} | {where: part}
    config = {"model_type": "encoder-decoder", "is_encoder_decoder": True, "architectures": ["EncoderDecoderModel"], **parts}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with contextlib.suppress(DataError):
        open_model(str(tmp_path / "model"))
    assert not ran.exists()
    assert asked == []
    assert not hasattr(getattr(read_config(tmp_path / "model"), where), "auto_map")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_a_hub_are_not_fetched(tmp_path, key):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(GPT2 | {key: "kernels-community/flash-attn"}))
    config = read_config(tmp_path / "model")
    assert "/" not in str(config._attn_implementation)
    assert sum(p.numel() for p in open_model(str(tmp_path / "model")).parameters()) > 0


def test_a_folder_with_code_and_a_class_of_transformers_is_read_by_that_class(tmp_path, asked):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    model.save_pretrained(tmp_path / "good")
    ran = hostile(tmp_path / "model", json.loads((tmp_path / "good/config.json").read_text()) | {"auto_map": EVERY})
    (tmp_path / "good/model.safetensors").rename(tmp_path / "model/model.safetensors")
    found = load_model(tmp_path / "model")
    assert type(found) is transformers.GPT2LMHeadModel
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    assert not ran.exists()
    assert asked == []
