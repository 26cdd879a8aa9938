"""TRL's SFTTrainer on a tiny Llama and a tiny tokenizer; nothing is fetched."""

import inspect
from importlib import import_module

import pytest
import torch

import lingrad.hf
from lingrad.errors import ModeError
from tests.support.models import llama
from tests.support.runs import MODES
from tests.support.trainers import arguments, assert_equal, logs, weights

pytest.importorskip("trl")

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "home", "again"]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, **{"unk_token": "<unk>"}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def texts(count=40):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 12, (count,), generator=generator).tolist()
    rows = [torch.randint(0, len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_list([{"text": " ".join(WORDS[i] for i in row)} for row in rows])


def build(folder, mode, cls=None, rules="svd(rank=4, every=3)", **args):
    from trl import SFTConfig

    config = arguments(
        folder, SFTConfig, **{"max_length": 16, "bf16": False, "save_strategy": "steps", "save_steps": 1, **args}
    )
    return (cls or lingrad.hf.LingradSFTTrainer)(
        llama(torch.float32),
        config,
        train_dataset=texts(),
        processing_class=tokenizer(),
        **lingrad.hf.trainer_kwargs(rules, config, mode=mode),
    )


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_and_resumes_bit_for_bit(tmp_path, mode, packing):
    args = {"gradient_accumulation_steps": 2, "packing": packing} | ({"packing_strategy": "wrapped"} if packing else {})
    trainer = build(tmp_path, mode, **args)
    trainer.train()
    assert trainer.args.gradient_checkpointing  # TRL's default
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"lingrad/refreshes", "mean_token_accuracy", "grad_norm"} <= entry.keys()
    for at in (2, 5):
        again = build(tmp_path / "again", mode, **args)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert_equal(weights(again), weights(trainer))
        assert_equal(again.optimizer.state_dict(), trainer.optimizer.state_dict())
        assert losses_of(again)[-1] == losses_of(trainer)[-1]


def test_the_adapter_that_is_saved(tmp_path):
    """Of a model whose forward TRL has replaced, and whose forward accelerate has put under autocast."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for bf16 in (False, True):
        trainer = build(tmp_path, "adapter", bf16=bf16)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        adapted = PeftModel.from_pretrained(llama(torch.float32), tmp_path / "saved/adapter")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        ids = torch.arange(12)[None]
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)
            assert (llama(torch.float32)(ids).logits - whole(ids).logits).abs().max() > 0.1


def losses_of(trainer):
    return [entry["loss"] for entry in logs(trainer) if "loss" in entry]


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_which_is_its_default(tmp_path, mode):
    trainer = build(tmp_path, mode, bf16=None, max_steps=4)
    assert trainer.args.bf16
    trainer.train()
    assert all(weight.isfinite().all() for weight in weights(trainer).values())


def test_both_modes_and_the_stock_trainer_agree(tmp_path):
    from trl import SFTTrainer

    found = []
    for number, (mode, cls) in enumerate([("optimizer", None), ("adapter", None), ("adapter", SFTTrainer)]):
        trainer = build(tmp_path / str(number), mode, cls, max_grad_norm=0)
        trainer.train()
        found.append(weights(trainer))
    for other in found[1:]:
        for name, weight in found[0].items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-4, msg=name)  # float32; Adam divides by rounding


def test_a_head_that_it_uses_behind_its_back(tmp_path):
    """It multiplies by lm_head.weight itself, where a projected backward sees nothing."""
    trainer = build(tmp_path, "optimizer", rules={"*.mlp.*": "svd(rank=4)", "lm_head": "svd(rank=4)"})
    if "fused_lm_head" not in inspect.getsource(
        import_module("trl.trainer.sft_trainer")
    ):  # TRL 1.0 leaves the head to the model
        trainer.train()
        return
    with pytest.raises(ModeError, match=r"lm_head.weight is transformed, but SFTTrainer multiplies by it") as caught:
        trainer.train()
    assert "{'lm_head.weight': 'none', ...}" in str(caught.value)
