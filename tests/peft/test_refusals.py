"""What PEFT cannot express, and what can go wrong in an export: a clear error, and nothing is left."""

import json

import pytest
import torch
from torch import nn

import lingrad
from lingrad import peft as bridge
from lingrad.errors import DataError, DependencyError, ExportError, ModeError
from tests.support.models import gap, llama, text_batches, train
from tests.support.peft_models import CASES
from tests.support.peft_runs import EXACT, left_in, llama_run, merged_by_peft, peft
from tests.support.runs import weights_of


class _Own(nn.Linear):
    """No layer that lingrad knows, so that it is trained whatever reads it."""


class _Unread(nn.Module):
    """Reads the weight of a layer without calling it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), _Own(6, 6)

    def forward(self, x):
        return nn.functional.linear(self.first(x).tanh(), self.second.weight)


class _Odd(nn.Module):
    """A module of every kind that PEFT has no low-rank form for."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.dilated = nn.Conv1d(8, 8, 3, dilation=2, padding=2)
        self.transposed = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        x = self.proj(x)
        for layer in (self.grouped, self.dilated, self.transposed):
            x = layer(x.mT).mT
        return self.recurrent(self.attention(x, x, x)[0])[0]


class _Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 6)
        self.extra = nn.ParameterList([nn.Parameter(torch.zeros(6))])

    def forward(self, x):
        return self.inner(x * self.scale) + self.extra[0]


class _Confusing(nn.Module):
    """Names that end with one another."""

    def __init__(self):
        super().__init__()
        self.norm, self.post_norm = nn.LayerNorm(6), nn.LayerNorm(6)
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
        self.my_proj = nn.Linear(6, 6)

    def forward(self, x):
        x = self.my_proj(self.proj(self.norm(x)))
        return self.inner["other"](self.inner["proj"](self.post_norm(x)))


def tuned(model, rules, x, tmp_path, **options):
    opt = lingrad.wrap(model, rules, "adamw", lr=1e-2, ledger=True)
    for _ in range(3):
        opt.zero_grad()
        model(x).pow(2).mean().backward()
        opt.step()
    return opt, bridge.export(opt, tmp_path / "a", inputs=x, quiet=True, **options)


def fresh(cls):
    torch.manual_seed(0)
    return cls().double()


class TestWhatPeftCannotExpress:
    X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    @pytest.mark.parametrize(
        ("glob", "reason"),
        [
            ("grouped", "2 groups"),
            ("dilated", "no dilation"),
            ("transposed", "no layer for a ConvTranspose1d"),
            ("attention.in_proj_weight", "nn.MultiheadAttention reads it"),
            ("attention.out_proj", "nn.MultiheadAttention reads it"),
            ("recurrent.weight_hh_l0", "nn.GRU reads it"),
        ],
    )
    def test_is_refused_or_saved_whole(self, glob, reason, tmp_path):
        x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        rules = {glob: "svd(rank=2)", "proj": "svd(rank=2)", "*": "none"}
        with pytest.raises(ExportError, match=f"no low-rank form.*{reason}.*whole=True"):
            tuned(fresh(_Odd), rules, x, tmp_path)
        assert left_in(tmp_path) == []
        opt, report = tuned(fresh(_Odd), rules, x, tmp_path, whole=True)
        assert any(reason in note for note in report.notes)
        loaded = peft.PeftModel.from_pretrained(fresh(_Odd), tmp_path / "a")
        assert torch.allclose(loaded(x), opt.model(x), rtol=0, atol=1e-12)

    def test_a_weight_that_several_embeddings_share_is_saved_whole_in_each(self, tmp_path):
        from transformers import T5Config, T5ForConditionalGeneration

        def t5():
            torch.manual_seed(0)
            sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
            return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).double()

        model = t5()
        opt = lingrad.adapt(model, "svd(rank=2, every=2)", "adamw", lr=1e-2, ledger=True)
        train(model, opt, text_batches(3, micro=1), lambda model, ids: model(input_ids=ids, labels=ids).loss)
        report = bridge.export(opt, tmp_path / "a", start=t5(), quiet=True)
        assert {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"} <= set(report.saved_modules)
        merged, trained = merged_by_peft(t5(), tmp_path / "a"), weights_of(opt)  # in the one, copies that are tied no more
        assert gap({name: merged[name] for name in trained}, trained) <= EXACT

    def test_a_tied_weight_is_saved_whole_in_both_places(self, tmp_path):
        model = CASES["tied"].build()
        opt = lingrad.adapt(model, {"*": "svd(rank=4, every=3)"}, "adamw", lr=1e-2, ledger=True)
        train(model, opt, text_batches(4))
        report = bridge.export(opt, tmp_path / "a", start=CASES["tied"].build(), quiet=True)
        assert {"lm_head", "model.embed_tokens"} <= set(report.saved_modules)
        assert any("tied to lm_head.weight" in note for note in report.notes)
        assert gap(merged_by_peft(CASES["tied"].build(), tmp_path / "a"), weights_of(opt)) <= EXACT

    def test_parameters_whose_module_holds_adapters_are_saved_by_themselves(self, tmp_path):
        opt, report = tuned(fresh(_Root), "svd(rank=2)", self.X, tmp_path)
        assert set(report.alongside) == {"scale", "inner.bias", "extra.0"}
        assert any("disable_adapter() does not remove it" in note for note in report.notes)
        loaded = peft.PeftModel.from_pretrained(fresh(_Root), tmp_path / "a")
        assert torch.allclose(loaded(self.X), opt.model(self.X), rtol=0, atol=1e-12)
        adapter = bridge.read_adapter(tmp_path / "a", fresh(_Root))
        assert set(adapter.full) == set(report.alongside)

    def test_a_layer_that_is_read_but_not_called_is_noticed(self, tmp_path):
        with pytest.raises(ExportError, match="does not give the run's outputs"):
            tuned(fresh(_Unread), {"*": "svd(rank=2)"}, self.X, tmp_path)
        assert left_in(tmp_path) == []
        tuned(
            fresh(_Unread), {"first": "svd(rank=2)", "*": "none"}, self.X, tmp_path
        )  # what is saved whole is read as it should be

    def test_names_that_end_with_one_another(self, tmp_path):
        opt, _ = tuned(fresh(_Confusing), {"proj": "svd(rank=2)", "*": "none"}, self.X, tmp_path)
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["target_modules"] == "proj"  # a regular expression, which must match all of a name
        loaded = peft.PeftModel.from_pretrained(fresh(_Confusing), tmp_path / "a")
        assert torch.allclose(loaded(self.X), opt.model(self.X), rtol=0, atol=1e-12)

    def test_a_saved_name_that_peft_would_find_elsewhere(self, tmp_path):
        model = fresh(_Confusing).requires_grad_(False)
        model.norm.requires_grad_(True)
        model.my_proj.requires_grad_(True)
        with pytest.raises(ExportError, match="'norm' must be saved in full.*would take 'post_norm'"):
            tuned(model, {"my_proj": "svd(rank=2)", "*": "none"}, self.X, tmp_path)

    def test_nothing_of_low_rank(self, tmp_path):
        model = llama()
        opt = lingrad.wrap(model, "svd(rank=4)", "adamw", lr=1e-2, ledger=True)
        with pytest.raises(ExportError, match="nothing has a low-rank change"):
            bridge.export(opt, tmp_path / "a", quiet=True)


class TestWhatGoesWrong:
    def test_a_path_that_exists(self, tmp_path):
        _, opt = llama_run()
        (tmp_path / "a").mkdir()
        with pytest.raises(DataError, match="exists, and nothing is overwritten"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == ["a"]

    def test_another_base(self, tmp_path):
        _, opt = llama_run()
        other = llama()
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
        with pytest.raises(ExportError, match="layers.1.mlp.up_proj.weight.*the start given is not what the run started from"):
            bridge.export(opt, tmp_path / "a", start=other, quiet=True)
        with pytest.raises(ExportError, match="the start given is another model: 'lm_head.weight' is"):
            bridge.export(opt, tmp_path / "a", start=llama(vocab_size=70), quiet=True)
        with pytest.raises(ExportError, match="'model.layers.2.*absent"):
            bridge.export(opt, tmp_path / "a", start=llama(num_hidden_layers=3), quiet=True)
        with pytest.raises(DataError, match="there is no folder"):
            bridge.export(opt, tmp_path / "a", start=tmp_path / "none", quiet=True)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="cannot be read as a LlamaForCausalLM"):
            bridge.export(opt, tmp_path / "a", start=tmp_path / "empty", quiet=True)
        assert left_in(tmp_path) == ["empty"]

    def test_a_frozen_weight_that_differs_from_the_base(self, tmp_path):
        model = llama()
        model.model.norm.requires_grad_(False)
        opt = lingrad.adapt(model, "svd(rank=4)", "adamw", lr=1e-2)
        train(model, opt, text_batches(1))
        other = llama()
        nn.init.constant_(other.model.norm.weight, 2.0)
        with pytest.raises(ExportError, match="'model.norm.weight' was not trained, and differs"):
            bridge.export(opt, tmp_path / "a", start=other, quiet=True)

    def test_a_weight_that_somebody_else_changed(self, tmp_path):
        model, opt = llama_run("optimizer")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        with pytest.raises(ExportError, match="other programs changed the weight"):
            bridge.export(opt, tmp_path / "a", start=llama(), quiet=True)

    def test_keys_that_peft_would_only_warn_about(self, tmp_path, monkeypatch):
        _, opt = llama_run()
        monkeypatch.setattr("lingrad.peft.slots.PREFIX", "model.")
        with pytest.raises(ExportError, match="does not reproduce"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == []

    def test_a_config_that_targets_something_else(self, tmp_path, monkeypatch):
        _, opt = llama_run()
        monkeypatch.setattr("lingrad.peft.names.target_modules", lambda *_: ["q_proj"])
        with pytest.raises(
            ExportError,
            match="PEFT puts an adapter of a weight in another module than lingrad wrote it for: none at model.layers",
        ):
            bridge.export(opt, tmp_path / "a", quiet=True)

    def test_without_peft(self, tmp_path, monkeypatch):
        _, opt = llama_run()
        monkeypatch.setitem(__import__("sys").modules, "peft", None)
        with pytest.raises(DependencyError, match=r"^exporting to PEFT needs the package peft: pip install 'lingrad\[hf\]'$"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == []

    @pytest.mark.parametrize(
        "where",
        ["lingrad.peft.write.write_tensors", "lingrad.peft.write.write_whole", "lingrad.peft.report.AdapterReport.write"],
    )
    def test_a_full_disk_leaves_nothing(self, where, tmp_path, monkeypatch):
        _, opt = llama_run()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(where, full)
        with pytest.raises(OSError, match="No space left"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == []

    def test_what_is_no_run(self, tmp_path):
        with pytest.raises(ExportError, match="expected a lingrad optimizer"):
            bridge.export(llama(), tmp_path / "a")
        model, opt = llama_run()
        with pytest.raises(ExportError, match="wrapped by lingrad; pass its optimizer"):
            bridge.export((model, opt.changes()), tmp_path / "a")
        opt.detach()
        with pytest.raises(ModeError, match="detached"):
            bridge.export(opt, tmp_path / "a")
        model = llama()
        opt = lingrad.wrap(model.named_parameters(), {"*_proj.weight": "svd(rank=4)", "*": "none"}, ledger=True)
        with pytest.raises(ExportError, match="pass the pair"):
            bridge.export(opt, tmp_path / "a")

    def test_a_model_of_peft_is_refused(self, tmp_path):
        config = peft.LoraConfig(target_modules=["q_proj"])
        model = peft.get_peft_model(llama(), config)
        model.requires_grad_(True)
        opt = lingrad.adapt(model, {"*.up_proj": "svd(rank=4)", "*": "none"}, lr=1e-2)
        with pytest.raises(ExportError, match="PEFT's layers in it.*merge_and_unload"):
            bridge.export(opt, tmp_path / "a")
        with pytest.raises(ExportError, match="PEFT's layers in it"):
            bridge.load(tmp_path, model)
