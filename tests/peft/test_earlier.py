"""Adapters saved with transformers 4, whose modules transformers 5 renamed or fused: as PEFT loads them, or refused."""

import json
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model

import lingrad
from lingrad.convert import merge
from lingrad.errors import CheckpointError, DualityError
from lingrad.peft import read_adapter

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {"language_model.model.layers.0.self_attn.q_proj": (32, 32), "language_model.model.layers.0.mlp.down_proj": (32, 64)}


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4))


MOE = SMALL | {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}


def qwen2_moe():
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=64))


def qwen3_moe():
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE, head_dim=8))


def sight():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)


def llava():
    config = transformers.LlavaConfig(vision_config=sight(), text_config=transformers.LlamaConfig(**SMALL), image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=sight(), text_config=transformers.LlamaConfig(**SMALL), image_token_index=5
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def vipllava():
    config = transformers.VipLlavaConfig(
        vision_config=sight(), text_config=transformers.LlamaConfig(**SMALL), image_token_index=5, vision_feature_layers=[0, 1]
    )
    return transformers.VipLlavaForConditionalGeneration(config)


def qwen2_vl():
    text = SMALL | {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    return transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(text_config=text, vision_config=vision))


def experts(inside, names):
    up = (64, 32)
    return {
        f"model.layers.0.{inside}.experts.{i}.{n}": up[::-1] if n in ("w2", "down_proj") else up
        for i in range(4)
        for n in names
    }


WRITTEN = ["w1", "w2", "w3"]
GATED = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = {"model.layers.0.self_attn.q_proj": (32, 32)}
# the model now, the modules' names and shapes then, the targets in the config
CASES = {
    "Mixtral": (mixtral, experts("block_sparse_moe", WRITTEN), WRITTEN),
    "Mixtral, attention too": (mixtral, experts("block_sparse_moe", WRITTEN) | ATTENTION, [*WRITTEN, "q_proj"]),
    "Qwen3-MoE": (qwen3_moe, experts("mlp", GATED), GATED),
    "Llava": (llava, TEXT, r".*language_model.*\.(q_proj|down_proj)"),
    "Llava, a list": (llava, TEXT, ["q_proj", "down_proj"]),
    "Llava-Next": (llava_next, TEXT, r".*language_model.*\.(q_proj|down_proj)"),
    "VipLlava": (vipllava, TEXT, r".*language_model.*\.(q_proj|down_proj)"),
}
# what PEFT 0.21 leaves out, with a warning only
LEFT_OUT = {
    "Qwen2-MoE": (qwen2_moe, experts("mlp", GATED), GATED),
    "Qwen2-VL": (qwen2_vl, ATTENTION, ["q_proj"]),
}


def built(build):
    torch.manual_seed(0)
    return build().eval()


def saved(folder, modules, targets, **options):
    generator, tensors = torch.Generator().manual_seed(1), {}
    for module, (m, n) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, n, generator=generator) * 0.1
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(m, 4, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return folder


def by_peft(build, folder):
    """The weights that PEFT merges."""
    return peft.PeftModel.from_pretrained(built(build), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("name", CASES)
def test_is_read_as_peft_reads_it(tmp_path, name):
    build, modules, targets = CASES[name]
    folder, model = saved(tmp_path / "adapter", modules, targets), built(build)
    expected, start = by_peft(build, folder), model.state_dict()
    adapter = read_adapter(folder, model)
    changed = {key for key, value in expected.items() if not torch.equal(value, start[key])}
    assert changed == set(adapter.low_rank)
    for key, value in expected.items():
        assert torch.allclose(adapter.apply(key, start[key]), value, rtol=0, atol=1e-6), key  # both add in float32


@pytest.mark.parametrize("name", CASES)
def test_is_trained_further(tmp_path, name):
    """A run starts at the outputs that PEFT has; experts, whose bases are one's own, on the side that can be."""
    build, modules, targets = CASES[name]
    folder, model = saved(tmp_path / "adapter", modules, targets), built(build)
    ids = torch.randint(6, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    frozen = "A"
    if "experts" in next(iter(modules)):
        with pytest.raises(DualityError, match="frozen='B'"):
            lingrad.peft.load(folder, model, lr=1e-2, frozen="A")
        frozen = "B"
    run = lingrad.peft.load(folder, model, lr=1e-2, frozen=frozen)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(built(build), folder)(input_ids=ids).logits
        assert torch.allclose(model.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    before = [sub.coords.clone() for sub in run.subspaces]
    run.step()
    assert any(not torch.equal(sub.coords, old) for sub, old in zip(run.subspaces, before, strict=True))


@pytest.mark.parametrize("name", ["Mixtral", "Llava"])
def test_is_merged_as_peft_merges_it(tmp_path, name):
    build, modules, targets = CASES[name]
    folder = saved(tmp_path / "adapter", modules, targets)
    base = built(build)
    base.save_pretrained(tmp_path / "base")
    save_model(base, str(tmp_path / "base" / "model.safetensors"))  # transformers' own names are the earlier ones
    merge(tmp_path / "base", folder, tmp_path / "merged")
    expected, found = by_peft(build, folder), load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value, rtol=0, atol=1e-6) for key, value in expected.items())


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_peft_would_leave_out_is_refused(tmp_path, name):
    build, modules, targets = LEFT_OUT[name]
    folder, model = saved(tmp_path / "adapter", modules, targets), built(build)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        expected = by_peft(build, folder)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="the adapter has factors for 'model.layers.0"):
        read_adapter(folder, model)


def test_half_of_what_was_fused_is_refused(tmp_path):
    """PEFT cannot fuse w1 without w3, and says so."""
    folder = saved(tmp_path / "adapter", experts("block_sparse_moe", ["w1"]), ["w1"])
    with pytest.raises(CheckpointError, match="PEFT cannot rename its factors: ValueError: Cannot convert .* w1 without"):
        read_adapter(folder, built(mixtral))


def test_of_another_model_is_refused(tmp_path):
    folder = saved(tmp_path / "adapter", {"model.layers.0.attention.query": (32, 32)}, ["query"])
    with pytest.raises(CheckpointError, match=r"factors for 'model\.layers\.0\.attention\.query', .* another model"):
        read_adapter(folder, built(mixtral))


def test_without_peft_says_what_reads_it(tmp_path, monkeypatch):
    folder = saved(tmp_path / "adapter", *CASES["Mixtral"][1:])
    monkeypatch.setitem(sys.modules, "peft.utils.transformers_weight_conversion", None)
    with pytest.raises(CheckpointError, match=r"saved with transformers 4, .* PEFT 0\.21 or later"):
        read_adapter(folder, built(mixtral))
