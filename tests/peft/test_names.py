"""Names as PEFT matches them: PEFT itself is the oracle."""

import itertools

import pytest

from lingrad.peft import names

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
