"""Folders that transformers writes under other names than the model's: experts one by one, modules by earlier names."""

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from lingrad.convert import convert, merge
from lingrad.convert.composed import open_folder
from lingrad.convert.tensors import params_of
from lingrad.files.model_folder import ModelFolder
from lingrad.models import load_model, open_model
from lingrad.peft import read_adapter
from tests.peft.test_earlier import CASES, built, llava, mixtral, qwen2_moe, qwen3_moe, saved

MODELS = {"Mixtral": mixtral, "Qwen2-MoE": qwen2_moe, "Qwen3-MoE": qwen3_moe, "Llava": llava}


@torch.no_grad()
def folders(path, build):
    """A model as transformers writes it, and with a change of rank 2 in its attention and experts; the changed names."""
    model, generator, changed = built(build), torch.Generator().manual_seed(3), set()
    model.save_pretrained(path / "start")
    for name, param in model.named_parameters():
        if name.endswith(("q_proj.weight", "experts.down_proj")):
            m, n = param.flatten(0, -2).shape
            left, right = (torch.randn(*shape, generator=generator) for shape in ((m, 2), (2, n)))
            param += 0.1 * (left @ right).view(param.shape)
            changed.add(name)
    model.save_pretrained(path / "tuned")
    return model.state_dict(), changed


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_read(tmp_path, name):
    model = built(MODELS[name])
    model.save_pretrained(tmp_path / "it", max_shard_size="20kB")
    folder = open_folder(tmp_path / "it", open_model(str(tmp_path / "it")))
    assert folder.parts
    own, state = params_of(model, folder.names), model.state_dict()
    assert set(own.values()) == set(state)
    for key, param in own.items():
        value = state[param]
        assert torch.equal(folder.read(key), value)
        assert torch.equal(folder.rows(key, value.shape[-1], 0, 1).flatten(), value.flatten()[: value.shape[-1]])


@pytest.mark.parametrize("name", ["Mixtral", "Mixtral, attention too", "Qwen3-MoE", "Llava"])
def test_an_adapter_is_merged_under_the_names_of_the_files(tmp_path, name):
    build, modules, targets = CASES[name]
    adapter, start = saved(tmp_path / "adapter", modules, targets), tmp_path / "start"
    built(build).save_pretrained(start, max_shard_size="20kB")
    merge(start, adapter, tmp_path / "merged")
    before, after = ModelFolder(start), ModelFolder(tmp_path / "merged")
    assert {key: [*file.entries] for key, file in before.files.items()} == {k: [*f.entries] for k, f in after.files.items()}
    theirs = peft.PeftModel.from_pretrained(built(build), adapter).merge_and_unload()
    found = load_model(tmp_path / "merged").state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-6), key  # both add in float32
    changed = {key for key in before.names if not torch.equal(before.read(key), after.read(key))}
    owners = {part.name: param for param, parts in open_folder(start, open_model(str(start))).parts.items() for part in parts}
    assert {owners.get(key, key) for key in changed} == set(read_adapter(adapter, built(build)).low_rank)


@pytest.mark.parametrize("name", MODELS)
def test_two_folders_are_converted(tmp_path, name):
    state, changed = folders(tmp_path, MODELS[name])
    report = convert(tmp_path / "start", tmp_path / "tuned", tmp_path / "adapter")
    assert {row.name for row in report.rows} == changed
    adapter, start = read_adapter(tmp_path / "adapter", built(MODELS[name])), built(MODELS[name]).state_dict()
    for key, value in state.items():
        assert torch.allclose(adapter.apply(key, start[key]), value, rtol=0, atol=1e-5), key  # factors are float32
    merge(tmp_path / "start", tmp_path / "adapter", tmp_path / "merged")
    for key, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.allclose(value, load_file(tmp_path / "tuned" / "model.safetensors")[key], rtol=0, atol=1e-5), key


def test_a_decayed_start_is_decayed_part_by_part(tmp_path):
    _, changed = folders(tmp_path, mixtral)
    tuned, start = (load_file(tmp_path / which / "model.safetensors") for which in ("tuned", "start"))
    decays = {key for key in start if "w2" in key or "q_proj" in key}
    save_file({k: v - 0.01 * start[k] * (k in decays) for k, v in tuned.items()}, tmp_path / "tuned" / "model.safetensors")
    convert(tmp_path / "start", tmp_path / "tuned", tmp_path / "adapter", decayed_start=tmp_path / "decayed")
    assert changed
    for key, value in load_file(tmp_path / "decayed" / "model.safetensors").items():
        assert torch.allclose(value, start[key] * (0.99 if key in decays else 1.0), rtol=1e-5, atol=0), key


def test_one_folder_may_have_the_names_of_the_model(tmp_path):
    _, changed = folders(tmp_path, mixtral)
    save_model(load_model(tmp_path / "tuned"), str(tmp_path / "tuned" / "model.safetensors"))
    report = convert(tmp_path / "start", tmp_path / "tuned", tmp_path / "adapter")
    assert {row.name for row in report.rows} == changed


def test_an_expert_that_is_missing_is_no_part(tmp_path):
    folders(tmp_path, mixtral)
    folder = shutil.copytree(tmp_path / "start", tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, folder / "model.safetensors")
    found = open_folder(folder, open_model(str(folder)))
    assert not any("down_proj" in name for name in found.parts)
    assert "model.layers.0.block_sparse_moe.experts.0.w2.weight" in found.names
