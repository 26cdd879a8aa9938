"""PEFT's own tools on exported adapters: swapped, combined, switched off, and several in one batch."""

from typing import get_args, get_type_hints

import pytest
import torch

import lingrad
from lingrad import peft as bridge
from tests.support.models import llama, text_batches, train
from tests.support.peft_runs import EXACT, peft

MIXED = {"*.0.self_attn.*": "svd(rank=3, every=2)", "*_proj": "svd(rank=4, every=0)"}
KINDS = get_args(get_type_hints(peft.tuners.lora.LoraModel.add_weighted_adapter)["combination_type"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs by name, one of them with ranks that differ, with their folders and logits; the model they started from."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for name, rules, seed in (("equal", "svd(rank=6, every=0)", 3), ("mixed", MIXED, 4)):
        model = llama()
        opt = lingrad.adapt(model, rules, "adamw", lr=1e-2, ledger=True, train_only="transformed")
        train(model, opt, text_batches(4, micro=1, seed=seed))
        bridge.export(opt, root / name, target="vllm" if name == "mixed" else "peft", base_model="org/model", quiet=True)
        found[name] = root / name, logits(model)
    return found


@torch.no_grad()
def logits(model, **options):
    return model.eval()(input_ids=text_batches(1, rows=3, seed=9)[0][0], **options).logits


@pytest.fixture
def both(runs):
    """A model of PEFT with both adapters."""
    model = peft.PeftModel.from_pretrained(llama(), runs["equal"][0], adapter_name="equal")
    model.load_adapter(runs["mixed"][0], adapter_name="mixed")
    return model


def close(found, expected):
    return float((found - expected).abs().max() / expected.abs().max()) <= EXACT


def test_one_at_a_time_and_none(runs, both):
    for name in ("mixed", "equal"):
        both.set_adapter(name)
        assert close(logits(both), runs[name][1])
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(llama()))
    both.delete_adapter("equal")
    both.set_adapter("mixed")
    assert close(logits(both), runs["mixed"][1])
    assert torch.equal(logits(both.unload()), logits(llama()))


def test_each_row_of_a_batch_has_its_own(runs, both):
    names = ["mixed", "__base__", "equal"]
    found = logits(both, adapter_names=names)
    for row, name in enumerate(names):
        assert close(found[row], (logits(llama()) if name == "__base__" else runs[name][1])[row])


def test_one_is_swapped_for_the_other(runs):
    from peft.utils.hotswap import hotswap_adapter

    model = peft.PeftModel.from_pretrained(llama(), runs["mixed"][0])
    hotswap_adapter(model, str(runs["equal"][0]), adapter_name="default", torch_device="cpu")
    assert close(logits(model), runs["equal"][1])


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {"svd_rank": 12})])
def test_a_combination_is_the_sum_of_the_changes(both, kind, options):
    both.add_weighted_adapter(["equal", "mixed"], [0.25, 0.75], "sum", combination_type=kind, **options)
    for name, layer in both.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            expected = 0.25 * layer.get_delta_weight("equal") + 0.75 * layer.get_delta_weight("mixed")
            assert close(layer.get_delta_weight("sum"), expected), name


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_combination(runs, both, kind):
    """Of two it is another model; of one alone, where everything is kept, it is that one."""
    torch.manual_seed(0)
    options = {} if kind in ("svd", "linear", "cat") else {"density": 0.5}
    both.add_weighted_adapter(["equal", "mixed"], [0.5, 0.5], "both", combination_type=kind, **options)
    both.set_adapter("both")
    found = logits(both)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, logits(llama()))
    both.add_weighted_adapter(["mixed"], [1.0], "alone", combination_type=kind, **dict.fromkeys(options, 1.0))
    both.set_adapter("alone")
    # in the kinds with an SVD, columns of zeros come back as singular vectors of values of 1e-16
    assert float((logits(both) - runs["mixed"][1]).abs().max() / runs["mixed"][1].abs().max()) <= 1e-10
