"""Names as PEFT matches them: PEFT itself is the oracle."""

import itertools
import json

import pytest
import torch

from lingrad.errors import DataError
from lingrad.peft import names
from lingrad.peft.read import read_adapter

peft = pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.mlp.up_proj",
    "model.layers.1.experts.0.up_proj",
    "transformer.h.1.attn.c_attn",
    "layers.0.q_proj",
    "q_proj",
    "lm_head",
    "score.out",
]
TARGETS = [
    ["q_proj"],
    ["self_attn.q_proj", "up_proj"],
    ["model.layers.0.self_attn.q_proj"],
    ["proj"],
    ["c_attn", "lm_head"],
    r".*\.(q|up)_proj",
    "q_proj",
    "all-linear",
]
EXCLUDED = [None, ["q_proj"], ["layers.1.self_attn.q_proj"], r".*\.1\..*", []]
LAYERS = [None, 0, [1], [0, 10], []]
PATTERNS = [None, "layers", ["h", "layers"], []]
SAVED = [None, ["score"], ["lm_head"]]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_a_module_is_left_out_where_peft_leaves_it_out(targets):
    from peft.tuners.tuners_utils import check_target_module_exists

    cases = 0
    for exclude, layers, pattern, saved in itertools.product(EXCLUDED, LAYERS, PATTERNS, SAVED):
        if isinstance(targets, str) and (layers is not None or pattern is not None):
            continue  # PEFT takes no such config
        if pattern and not layers:
            continue
        config = {
            "target_modules": targets,
            "exclude_modules": exclude,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
            "modules_to_save": saved,
        }
        theirs = peft.LoraConfig(**config)
        for name in MODULES:
            cases += 1
            option = names.left_out_by(name, config)
            if targets == "all-linear" and option is None:
                continue  # which layers those are PEFT decides by their classes, not by names
            assert (option is None) == bool(check_target_module_exists(theirs, name)), (config, name)
            assert option is None or config[option] is not None
    assert cases > 100


def test_a_config_of_parameters_targets_no_module():
    from peft.tuners.tuners_utils import check_target_module_exists

    config = {"target_modules": None, "target_parameters": ["experts.gate_up_proj"]}
    assert names.left_out_by("q_proj", config) == "target_modules"
    assert not check_target_module_exists(peft.LoraConfig(**config), "q_proj")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("exclude_modules", "("),
        ("exclude_modules", 5),
        ("target_modules", "("),
        ("target_modules", [5]),
        ("modules_to_save", ["("]),
        ("modules_to_save", 3),
        ("layers_pattern", ["("]),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", [True]),
    ],
    ids=str,
)
def test_options_that_name_no_modules_are_refused(tmp_path, option, value):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], option: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"{option} must be names or regular expressions"):
        read_adapter(tmp_path, torch.nn.Linear(2, 2))
