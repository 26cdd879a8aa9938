"""The mixtures of experts that transformers has, found in its sources: a config string alone means their experts."""

import re
from pathlib import Path

import pytest
import torch

import lingrad
from lingrad.config.targets import resolve_model
from lingrad.transforms import Experts

transformers = pytest.importorskip("transformers", reason="make test installs it (extra: hf)")

SMALL = {
    "num_hidden_layers": 8,
    "n_layers": 8,
    "num_layers": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
}  # enough for a period


def kinds():
    """The configs of the models whose source has a parameter of three dimensions or one of experts."""
    root = Path(transformers.__file__).parent / "models"
    has = {path.parent.name for path in root.glob("*/modeling_*.py") if re.search(r"class \w*Expert", path.read_text())}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    return sorted(kind for kind in CONFIG_MAPPING_NAMES if model_type_to_module_name(kind) in has)


def shrunk(config):
    for name, value in SMALL.items():
        if isinstance(vars(config).get(name), int):
            setattr(config, name, min(value, vars(config)[name]))
    for name in getattr(config, "sub_configs", None) or {}:
        if getattr(config, name, None) is not None:
            shrunk(getattr(config, name))
    if config.model_type == "dbrx":
        config.attn_config.rope_theta = 1e4
    return config


def built(kind):
    with torch.device("meta"):
        return transformers.AutoModel.from_config(shrunk(transformers.AutoConfig.for_model(kind)))


def check(model):
    """The number of parameters of experts, all of which are transformed, each expert by itself."""
    targets = {target.name: target for target in resolve_model(model, "svd(rank=1, clip=true)").targets}
    found = 0
    for name, module in model.named_modules():
        if "Expert" not in type(module).__name__ or isinstance(module, torch.nn.Linear):
            continue
        for attribute, param in module.named_parameters(recurse=False):
            if param.dim() == 3 or (param.dim() == 2 and "bias" not in attribute and "Router" not in type(module).__name__):
                transform = targets[f"{name}.{attribute}"].transform
                assert isinstance(transform, Experts)
                assert param.dim() == 2 or transform.count == len(param)
                found += 1
    assert not lingrad.explain(model, "svd(rank=1, clip=true)").remark
    return found


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "dbrx", "jetmoe"])
def test_a_stack_of_each_form(kind):
    assert check(built(kind)) > 0


@pytest.mark.slow
def test_every_mixture_of_experts_of_transformers():
    found = {}
    for kind in kinds():
        try:
            model = built(kind)
        except Exception:  # noqa: S112 - its default config builds no model
            continue
        found[kind] = check(model)
    with_experts = [kind for kind, count in found.items() if count]
    wanted = {
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v2",
        "deepseek_v3",
        "olmoe",
        "phimoe",
        "jamba",
        "llama4",
    }
    assert wanted | {"granitemoe", "dbrx", "jetmoe", "nemotron_h"} <= set(with_experts)
    assert len(with_experts) >= 60
