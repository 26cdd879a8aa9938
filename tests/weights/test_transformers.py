"""Models of transformers that bitsandbytes has quantised, and the examples of docs/lowbit.md."""

import copy
import re
from pathlib import Path

import pytest
import torch

import lingrad
from lingrad.config.explain import explain
from tests.support.models import llama, text_batches, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama(torch.float32, hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(path)
    return path


def load(folder, **options):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not options.get("load_in_8bit"):
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | options
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32)
    return model.train()


class TestTransformers:
    @pytest.mark.parametrize(
        "options", [{"bnb_4bit_use_double_quant": True}, {"bnb_4bit_use_double_quant": False}, {"load_in_8bit": True}], ids=str
    )
    def test_a_quantised_model_is_trained(self, folder, options):
        model = load(folder, **options)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = lingrad.adapt(model, "svd(rank=8, every=4)", lr=1e-2, keep_remainder=True)
        kinds = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
        assert kinds == {"coords": 14, "matrices": 2, "vectors": 5}  # embedding and head, norms
        batch = text_batches(1)
        first = train(model, optimizer, batch, schedule=False)
        last = [train(model, optimizer, batch, schedule=False) for _ in range(12)][-1]
        assert last < 0.5 * first
        changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < changed
        assert all(loss.merges == 3 for loss in optimizer.merge_losses().values())

    def test_frozen_embeddings_stay(self, folder):
        model = load(folder)
        model.get_input_embeddings().requires_grad_(False)
        optimizer = lingrad.adapt(model, "svd(rank=8, every=4)", lr=1e-2)
        before = model.get_input_embeddings().weight.clone()
        train(model, optimizer, text_batches(2))
        assert torch.equal(model.get_input_embeddings().weight, before)
        assert all(sub.coords.any() for sub in optimizer.subspaces)

    def test_it_is_explained_in_numbers_of_the_weight(self, folder):
        shown = explain(load(folder), "svd(rank=8)")
        line = next(line for line in shown.lines if "gate_proj" in line.name)
        assert (line.weight, line.coords, line.gradient) == ("128 x 64", "128 x 8", "projected")
        plain = explain(llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4), "svd(rank=8)")
        assert (shown.parameters, shown.trained) == (plain.parameters, plain.trained)

    def test_gradient_checkpointing(self, folder):
        ends = []
        for checkpointing in (False, True):
            model = load(folder)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            optimizer = lingrad.adapt(model, "svd(rank=8, every=2)", lr=1e-2)
            train(model, optimizer, text_batches(4))
            ends.append(optimizer.weights())
        assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items())

    def test_a_copy_evaluates_alike(self, folder):
        model = load(folder)
        optimizer = lingrad.adapt(model, "svd(rank=8)", lr=1e-2)
        train(model, optimizer, text_batches(2))
        ids = torch.arange(12)[None]
        with torch.no_grad():
            expected = model.eval()(ids).logits
            assert torch.allclose(copy.deepcopy(model)(ids).logits, expected, atol=1e-5)


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "lowbit.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(block, names)  # noqa: S102
    printed = capsys.readouterr().out
    assert re.search(r"```text\n(.*?)```", text, flags=re.DOTALL)[1] in printed
    assert "model.layers.1.mlp.down_proj.weight: 2 merges, the last lost " in printed
