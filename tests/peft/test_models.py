"""Exports of models that are unlike a Llama: what they read, and what their code does with its layers."""

import json

import pytest
import torch
from torch import nn

import lingrad
import lingrad.peft as bridge
from lingrad.errors import ExportError
from lingrad.peft.bare import bare_copy
from tests.support.models import llama, text_batches, train
from tests.support.peft_runs import EXACT, left_in

peft = pytest.importorskip("peft")


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 16, "max_target_positions": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    tokens = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **tokens, num_mel_bins=8))


def speech2text():
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "input_feat_per_channel": 8, "conv_channels": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return Speech2TextForConditionalGeneration(Speech2TextConfig(**sizes, **heads, vocab_size=64))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


IDS = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(2))
MODELS = {
    "whisper": (whisper, {"input_features": drawn(2, 8, 32), "decoder_input_ids": IDS}),
    "speech2text": (speech2text, {"input_features": drawn(2, 32, 8), "decoder_input_ids": IDS}),
    "vit": (vit, {"pixel_values": drawn(2, 3, 16, 16)}),
}


def fresh(build):
    torch.manual_seed(0)
    return build().double().eval()


def tuned(model, inputs, rules="svd(rank=2, every=2)"):
    opt = lingrad.adapt(model, rules, "adamw", lr=1e-2, ledger=True)
    for _ in range(3):
        opt.zero_grad()
        model(**inputs)[0].square().mean().backward()
        opt.step()
    return opt


@pytest.mark.parametrize("kind", MODELS)
def test_peft_runs_models_that_read_no_tokens(kind, tmp_path):
    build, inputs = MODELS[kind]
    model = fresh(build)
    opt = tuned(model, inputs)
    report = bridge.export(opt, tmp_path / "a", inputs=inputs, quiet=True)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] is None
    adapted = peft.PeftModel.from_pretrained(fresh(build), tmp_path / "a").eval()
    with torch.no_grad():
        found, expected, initial = (one(**inputs)[0] for one in (adapted, model, fresh(build)))
    assert (found - expected).abs().max() <= EXACT < 1e-3 < (initial - expected).abs().max()
    assert report.outputs.difference <= EXACT


@pytest.mark.parametrize("kind", MODELS)
def test_inputs_of_every_kind_are_made(tmp_path, kind):
    build, inputs = MODELS[kind]
    report = bridge.export(tuned(fresh(build), inputs), tmp_path / "a", quiet=True)
    made = report.outputs.inputs
    assert "random" in made
    assert all(name in made for name in inputs if not name.endswith(("_ids", "mask", "labels")))
    assert report.outputs.difference <= EXACT


def test_without_inputs_that_fit_it_is_not_done(tmp_path, monkeypatch):
    build, inputs = MODELS["vit"]
    opt = tuned(fresh(build), inputs)
    with monkeypatch.context() as patch:
        patch.setattr("lingrad.models.inputs._inputs", lambda *_: [])  # a model that runs on none that are tried
        with pytest.raises(
            ExportError, match=r"ViTForImageClassification cannot be compared.*inputs=\{'pixel_values': \.\.\.\}"
        ):
            bridge.export(opt, tmp_path / "a", quiet=True)
    with pytest.raises(ExportError, match="ViTForImageClassification does not run on the inputs given: .*; pass inputs="):
        bridge.export(opt, tmp_path / "a", inputs={"input_ids": IDS}, quiet=True)
    assert left_in(tmp_path) == []


def test_a_wrapper_of_peft_that_the_model_cannot_use(tmp_path):
    """transformers reads the strides of Whisper's convolutions, which PEFT's wrapper does not have."""
    build, inputs = MODELS["whisper"]
    opt = tuned(fresh(build), inputs, {"*.conv1": "svd(rank=2, every=2)", "*.q_proj": "svd(rank=2, every=2)", "*": "none"})
    with pytest.raises(ExportError, match="with the adapter does not run through PEFT on the inputs given: .*stride"):
        bridge.export(opt, tmp_path / "a", inputs=inputs, quiet=True)
    assert left_in(tmp_path) == []


def test_a_layer_that_returns_two_tensors(tmp_path):
    """PEFT adds to what a layer returns; routers that derive from Linear return a tuple."""

    class Router(nn.Linear):
        def forward(self, x):
            scores = super().forward(x)
            return scores, scores.softmax(-1)

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.router, self.out = nn.Linear(6, 6), Router(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            x = self.proj(x)
            scores, weights = self.router(x)
            return (self.out(x) * weights + scores,)

    opt = tuned(fresh(Routed), {"x": drawn(5, 6)}, {"*": "svd(rank=2)"})
    with pytest.raises(ExportError, match="Routed with the adapter does not run through PEFT on the inputs given"):
        bridge.export(opt, tmp_path / "a", inputs={"x": drawn(5, 6)}, quiet=True)


def test_a_bias_of_a_head_that_peft_ties_to_the_embedding(tmp_path):
    from transformers import CTRLConfig, CTRLLMHeadModel

    def ctrl():
        return CTRLLMHeadModel(CTRLConfig(vocab_size=64, n_positions=16, n_embd=16, dff=24, n_layer=1, n_head=2))

    opt = tuned(fresh(ctrl), {"input_ids": IDS})
    with pytest.raises(ExportError, match="PEFT's copy of 'lm_head' has no 'bias', so that it would be lost"):
        bridge.export(opt, tmp_path / "a", quiet=True)


class _Nested(nn.Module):
    """Returns its numbers in a tuple in a tuple, or none at all."""

    def __init__(self, empty=False):
        super().__init__()
        self.proj, self.empty = nn.Linear(6, 6), empty

    def forward(self, x):
        found = self.proj(x)
        return (found,) if self.training else ({"scores": 3} if self.empty else {"scores": (found.argmax(), (found,))})


def test_outputs_in_outputs_are_compared(tmp_path):
    opt = tuned(fresh(_Nested).train(), {"x": drawn(5, 6)}, {"*": "svd(rank=2)"})
    assert bridge.export(opt, tmp_path / "a", inputs=drawn(5, 6), quiet=True).outputs.change > 0


class _Listed(nn.Module):
    """Keeps a layer in a list of its own, as MaskFormer's pixel decoder does: PEFT's wrapper in its place is not called."""

    def __init__(self):
        super().__init__()
        self.head, self.mask = nn.Linear(6, 3), nn.Linear(6, 4)
        self.layers = [self.mask]

    def forward(self, x):
        logits, masks = self.head(x), self.layers[0](x)
        return (
            (torch.cat((logits, masks), -1),)
            if self.training
            else {"logits": logits, "masks": masks, "seen": -torch.inf * x.new_ones(1)}
        )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("svd(rank=2)", r"they differ by .* in 'masks', [0-9.,]+ times what .*some layer does not act through PEFT's wrapper"),
        ("none", r"it gives NaN in 'masks'. PEFT trains copies of modules \('mask'\), and the model seems to read an original"),
    ],
)
def test_every_output_is_compared(rule, message, tmp_path):
    """The mask is a factor pair, or saved in full: then PEFT's copy is what is not called."""
    opt = tuned(fresh(_Listed).train(), {"x": drawn(5, 6)}, {"mask": rule, "*": "svd(rank=2)"})
    with pytest.raises(ExportError, match=f"on the inputs given {message}"):
        bridge.export(opt, tmp_path / "a", inputs=drawn(5, 6), quiet=True)
    opt = tuned(fresh(_Listed).train(), {"x": drawn(5, 6)}, {"mask": "frozen", "*": "svd(rank=2)"})
    assert bridge.export(opt, tmp_path / "b", inputs=drawn(5, 6), quiet=True).outputs.difference <= EXACT


def test_outputs_that_are_no_numbers_on_both_sides_are_not_equal(tmp_path):
    opt = tuned(nn.Sequential(nn.Linear(6, 6)).double(), {"input": drawn(5, 6)}, {"*": "svd(rank=2)"})
    with pytest.raises(ExportError, match="the run's own outputs on the inputs given hold NaN in .*; pass inputs= on which"):
        bridge.export(opt, tmp_path / "a", inputs=torch.full((5, 6), torch.nan, dtype=torch.float64), quiet=True)


def test_outputs_without_numbers_are_not_compared(tmp_path):
    opt = tuned(_Nested(empty=True).double(), {"x": drawn(5, 6)}, {"*": "svd(rank=2)"})
    with pytest.raises(ExportError, match="the outputs of _Nested on the inputs given hold no numbers"):
        bridge.export(opt, tmp_path / "a", inputs=drawn(5, 6), quiet=True)


def test_a_model_that_knows_no_embedding(tmp_path):
    class Tied(nn.Module):
        _tied_weights_keys = ("head.weight",)

        def __init__(self):
            super().__init__()
            self.proj, self.table, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.head.weight = self.table.weight
            self.config = type("Config", (), {"tie_word_embeddings": True, "get": lambda self, name, default=None: default})()

        def get_input_embeddings(self):
            raise NotImplementedError

        def forward(self, x):
            return (self.head(self.table(self.proj(x))),)

    opt = tuned(fresh(Tied), {"x": drawn(5, 6)}, {"proj": "svd(rank=2)", "*": "none"})
    with pytest.raises(ExportError, match="PEFT does not load the adapter: NotImplementedError"):
        bridge.export(opt, tmp_path / "a", inputs=drawn(5, 6), quiet=True)


def test_states_that_a_forward_has_left_in_the_model(tmp_path):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.state = nn.Linear(6, 6), None

        def forward(self, x):
            self.state = self.proj(x)
            return (self.state.tanh(),)

    model = fresh(Remembers)
    opt = tuned(model, {"x": drawn(5, 6)}, {"*": "svd(rank=2)"})
    model(drawn(5, 6))
    report = bridge.export(opt, tmp_path / "a", inputs={"x": drawn(5, 6)}, quiet=True)
    assert report.outputs.difference <= EXACT


def test_a_copy_records_hidden_states_where_the_original_does():
    """transformers puts the hooks that record them into a model once, and notes that it has."""
    model = llama()
    ids = text_batches(1)[0][0]
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    copied = bare_copy(model)
    assert len(copied(input_ids=ids, output_hidden_states=True).hidden_states) == len(expected) > 1
    again = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(again) == len(expected)


def test_hidden_states_are_recorded_through_peft(tmp_path):
    model = llama()
    ids = text_batches(1)[0][0]
    opt = lingrad.adapt(model, "svd(rank=2, every=2)", "adamw", lr=1e-2, ledger=True)
    train(
        model, opt, text_batches(3), lambda model, ids: model(input_ids=ids, output_hidden_states=True).hidden_states[1].mean()
    )
    inputs = {"input_ids": ids, "output_hidden_states": True}
    assert bridge.export(opt, tmp_path / "a", inputs=inputs, quiet=True).outputs.difference <= EXACT
