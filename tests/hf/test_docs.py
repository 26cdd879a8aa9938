"""docs/trainer.md is run as it stands."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.support import trainers
from tests.support.docs import pages
from tests.support.trainers import assert_equal

PAGE = "trainer.md"


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    first, resumed, finished, galore = pages.blocks(PAGE)
    run(first, names)
    straight = trainers.weights(names["trainer"])
    torch.manual_seed(0)
    start = LlamaForCausalLM(names["model"].config)
    ids = torch.stack([row["input_ids"] for row in names["data"]])
    with torch.no_grad():
        adapted, whole = (m(ids).logits for m in (PeftModel.from_pretrained(start, "final/adapter"), names["model"]))
    torch.testing.assert_close(adapted, whole, rtol=0, atol=1e-4)
    for path in ("run/checkpoint-4/optimizer.pt", "run/checkpoint-8/trainer_state.json"):
        assert Path(path).exists()
    Path("run/checkpoint-8/trainer_state.json").unlink()
    run(resumed, names)
    assert_equal(trainers.weights(names["trainer"]), straight)
    run(finished, names)
    assert_equal(dict(AutoModelForCausalLM.from_pretrained("plain").named_parameters()), straight)
    run(galore, names)


def run(block, names):
    pages.run(block, names, PAGE)
