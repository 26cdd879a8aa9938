"""Adapters for PEFT: what PEFT itself makes of them is the oracle."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lingrad
from lingrad import peft as bridge
from lingrad.errors import DataError, DependencyError, DualityError, ExportError, ModeError, SpecError
from lingrad.layout import layout_of
from tests.peft_models import CASES, bert, conv, images
from tests.training import gap, gpt2, llama, text_batches, text_loss, train

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
SIDES = ("svd(rank=4, every=3, side=left)", "svd(rank=4, every=3, side=right)")
SPECS = (
    *SIDES,
    "svd(rank=4, every=3, side=both)",
    "random(rank=4, every=3, kind=rows)",
    "kron(left=svd(rank=3, every=3), right=random(rank=4, every=2))",
)
MODES = ("adapter", "optimizer")
EXACT = 1e-12  # float64: a few roundings of 1e-16 a step


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a method of its own that PEFT calls
        yield


def run_of(kind, spec, mode="adapter", steps=6, **options):
    case = CASES[kind]
    model = case.build()
    make = lingrad.adapt if mode == "adapter" else lingrad.wrap
    opt = make(model, case.rules(spec), "adamw", **{"lr": 1e-2, "ledger": True} | options)
    train(model, opt, case.batches(steps), case.loss)
    return model, opt


def merged_by_peft(model, path):
    return dict(peft.PeftModel.from_pretrained(model, path).merge_and_unload().named_parameters())


def weights_of(opt):
    return {name: weight.detach().clone() for name, weight in opt.weights().items()}


def llama_run(mode="adapter", dtype=torch.float64, steps=4, spec=SIDES[1], **options):
    model = llama(dtype)
    make = lingrad.adapt if mode == "adapter" else lingrad.wrap
    opt = make(model, spec, "adamw", **{"lr": 1e-2, "ledger": True} | options)
    train(model, opt, text_batches(steps, micro=1))
    return model, opt


def left_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


class TestWhatPeftMakesOfIt:
    @pytest.mark.parametrize(
        ("spec", "mode"), [*zip(SIDES, MODES, strict=True), *(slow(*pair) for pair in zip(SIDES, MODES[::-1], strict=True))]
    )
    @pytest.mark.parametrize("kind", CASES)
    def test_merged_by_peft_it_is_the_trained_model(self, kind, spec, mode, tmp_path):
        self.check(kind, spec, mode, tmp_path)

    @pytest.mark.parametrize("mode", ["adapter", "optimizer"])
    @pytest.mark.parametrize("spec", SPECS[2:])
    @pytest.mark.parametrize(
        "kind", [kind if kind in ("gpt2", "mixtral") else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES]
    )
    def test_so_it_is_with_every_kind_of_map(self, kind, spec, mode, tmp_path):
        self.check(kind, spec, mode, tmp_path)

    def check(self, kind, spec, mode, tmp_path):
        case = CASES[kind]
        start = dict(case.build().named_parameters())
        _, opt = run_of(kind, spec, mode)
        inputs = images(1)[0][0] if kind == "conv" else None
        report = bridge.export(opt, tmp_path / "a", base=case.build(), inputs=inputs, quiet=True)
        trained = weights_of(opt)
        assert gap(trained, {name: start[name] for name in trained}) > 1e-3
        merged = merged_by_peft(case.build(), tmp_path / "a")
        assert gap({name: merged[name] for name in trained}, trained) <= EXACT
        # six steps with a refresh every three (or two, on one side of kron): every basis has left its columns
        columns = 12 if spec.startswith("kron") else 8
        for row in report.rows:  # more columns than a weight has are as many as it needs, at most all
            module = opt._model.get_submodule(row.name.rpartition(".")[0])
            most = min(layout_of(start[row.name], module, row.name).shape)
            assert row.rank == columns if columns <= most else row.rank <= most
        assert report.residual <= 1e-10
        assert report.outputs <= 1e-7 * report.outputs_change  # float32 norms inside some models; elsewhere 1e-16

    @pytest.mark.parametrize("mode", ["adapter", "optimizer"])
    def test_in_float32(self, mode, tmp_path):
        _, opt = llama_run(mode, torch.float32, steps=7)
        report = bridge.export(opt, tmp_path / "a", base=llama(torch.float32), quiet=True)
        assert report.residual <= 1e-5  # a rounding of 6e-8 of the weight a step, where the change is a tenth of it
        assert gap(merged_by_peft(llama(torch.float32), tmp_path / "a"), weights_of(opt)) <= 1e-6

    def test_peft_runs_it_beside_the_weights_too(self, tmp_path):
        model, opt = llama_run()
        bridge.export(opt, tmp_path / "a", quiet=True)
        beside = peft.PeftModel.from_pretrained(llama(), tmp_path / "a")
        ids = text_batches(1)[0][0]
        with torch.no_grad():
            assert torch.allclose(beside(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-12)
            base = llama()(input_ids=ids).logits
            with beside.disable_adapter():
                assert torch.equal(beside(input_ids=ids).logits, base)

    def test_a_run_without_ledger_is_exported_until_it_merges(self, tmp_path):
        _, opt = llama_run(ledger=False, spec="svd(rank=4, every=5)")
        bridge.export(opt, tmp_path / "a", quiet=True)
        assert gap(merged_by_peft(llama(), tmp_path / "a"), weights_of(opt)) <= EXACT
        _, opt = llama_run(ledger=False, spec="svd(rank=4, every=2)")
        with pytest.raises(ModeError, match="ledger=True"):
            bridge.export(opt, tmp_path / "b", quiet=True)
        assert left_in(tmp_path) == sorted(left_in(tmp_path / "a") and [*("a/" + f for f in left_in(tmp_path / "a")), "a"])

    def test_only_what_was_trained_is_in_it(self, tmp_path):
        model = llama()
        model.requires_grad_(False)
        model.model.layers[1].mlp.requires_grad_(True)
        opt = lingrad.adapt(model, "svd(rank=4, every=0)", "adamw", lr=1e-2)
        train(model, opt, text_batches(3))
        report = bridge.export(opt, tmp_path / "a", quiet=True)
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["target_modules"] == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
        assert config["modules_to_save"] is None
        assert report.whole == report.beside == ()
        assert (
            gap({n: p for n, p in merged_by_peft(llama(), tmp_path / "a").items() if n in opt.weights()}, opt.weights())
            <= EXACT
        )

    def test_of_what_trains_in_full_only_what_changed_is_in_it_where_the_base_is_known(self, tmp_path):
        model = llama()
        opt = lingrad.adapt(model, "svd(rank=4, every=0)", "adamw", lr=1e-2)
        opt.param_groups[1]["lr"] = 0.0  # embeddings and the head
        train(model, opt, text_batches(2), schedule=False)
        report = bridge.export(opt, tmp_path / "a", base=llama(), quiet=True)
        assert not {"lm_head", "model.embed_tokens"} & set(report.whole)
        assert "model.norm" in report.whole
        assert {"lm_head", "model.embed_tokens"} <= set(bridge.export(opt, tmp_path / "b", quiet=True).whole)

    def test_ranks_that_differ(self, tmp_path):
        model = llama()
        rules = {
            "*.0.*.q_proj": "svd(rank=2, every=0)",
            "*.mlp.*": "svd(rank=40, every=0, clip=true)",
            "*_proj": "svd(rank=3, every=0)",
        }
        opt = lingrad.adapt(model, rules, "adamw", lr=1e-2)
        train(model, opt, text_batches(2))
        report = bridge.export(opt, tmp_path / "a", quiet=True)
        assert {row.rank for row in report.rows} == {2, 3, 32}
        assert gap(merged_by_peft(llama(), tmp_path / "a"), weights_of(opt)) <= EXACT

    def test_no_more_columns_than_a_weight_has(self, tmp_path):
        _, opt = llama_run(spec="svd(rank=16, every=1)", steps=5)
        report = bridge.export(opt, tmp_path / "a", base=llama(), quiet=True)
        assert {row.rank for row in report.rows} == {
            16,
            32,
        }  # keys and values have 16 rows; of the others 80 columns were noted
        assert gap(merged_by_peft(llama(), tmp_path / "a"), weights_of(opt)) <= EXACT

    def test_a_rank_that_is_asked_for(self, tmp_path):
        _, opt = llama_run(steps=6)
        with pytest.raises(ExportError, match="residual"):
            bridge.export(opt, tmp_path / "a", rank=6, quiet=True)
        report = bridge.export(opt, tmp_path / "a", rank=6, allow_residual=1.0, base=llama(), quiet=True)
        assert {row.rank for row in report.rows} == {6}
        for row in report.rows:
            values = torch.linalg.svdvals(opt.changes()[row.name].factors.dense())
            assert row.residual == pytest.approx(float(values[6:].norm() / values.norm()), rel=1e-6)  # Eckart-Young
        with pytest.raises(SpecError, match="rank must be a whole number"):
            bridge.export(opt, tmp_path / "b", rank=0)

    @pytest.mark.parametrize(
        ("options", "why"),
        [({"rank": 2}, "rank=2 was asked for, and its change has up to 8"), ({"dtype": torch.bfloat16}, "factors in bfloat16")],
    )
    def test_what_was_asked_for_is_named_as_the_cause(self, options, why, tmp_path):
        _, opt = llama_run()
        for base in (None, llama()):
            with pytest.raises(ExportError, match=f"{why}.*allow_residual=.* accepts it"):
                bridge.export(opt, tmp_path / "a", base=base, quiet=True, **options)
        assert left_in(tmp_path) == []

    @pytest.mark.parametrize(
        "options",
        [{"dtype": "bfloat16"}, {"dtype": torch.int8}, {"allow_residual": -1}, {"allow_residual": "1"}, {"rank": 2.0}],
    )
    def test_options_of_another_type(self, options, tmp_path):
        _, opt = llama_run()
        with pytest.raises(SpecError, match=f"^{next(iter(options))} must be a "):
            bridge.export(opt, tmp_path / "a", quiet=True, **options)

    def test_from_the_model_and_its_changes(self, tmp_path):
        model, opt = run_of("gpt2", SIDES[0])
        changes = opt.changes()
        opt.detach()
        report = bridge.export((model, changes), tmp_path / "a", base=gpt2(), quiet=True)
        assert report.residual <= 1e-10
        assert gap(merged_by_peft(gpt2(), tmp_path / "a"), dict(model.named_parameters())) <= EXACT
        plain = {name: change.factors for name, change in changes.items()}
        assert bridge.export((model, plain), tmp_path / "b", quiet=True).residual <= 1e-10

    def test_batch_statistics_go_with_their_module(self, tmp_path):
        case = CASES["conv"]
        model = case.build()
        model.norm.requires_grad_(False)
        opt = lingrad.adapt(model, {"second": "svd(rank=4, every=0)", "*": "none"}, "adamw", lr=1e-2)
        train(model, opt, case.batches(3), case.loss)
        report = bridge.export(opt, tmp_path / "a", inputs=images(1)[0][0], quiet=True)
        assert "norm" in report.whole
        loaded = peft.PeftModel.from_pretrained(conv(), tmp_path / "a").eval()
        model.eval()
        x = images(1)[0][0]
        assert torch.allclose(loaded(x), model(x), rtol=0, atol=1e-12)

    def test_factors_in_another_dtype(self, tmp_path):
        _, opt = llama_run(dtype=torch.float32)
        with pytest.raises(ExportError, match="residual"):
            bridge.export(opt, tmp_path / "a", dtype=torch.bfloat16, quiet=True)
        report = bridge.export(opt, tmp_path / "a", dtype=torch.bfloat16, allow_residual=0.01, quiet=True)
        assert 1e-4 < report.residual < 4e-3  # of two factors each is rounded to eight bits, 2^-9 at most
        exact = bridge.export(opt, tmp_path / "b", quiet=True)
        assert sum(row.nbytes for row in report.rows) * 2 == sum(row.nbytes for row in exact.rows)


class TestQuantisedBases:
    @pytest.fixture
    def quantised(self):
        bnb = pytest.importorskip("bitsandbytes")

        def build():
            model = llama(torch.float32, hidden_size=64, intermediate_size=128)
            for layer in model.model.layers:
                for module in (layer.self_attn, layer.mlp):
                    for name, child in list(module.named_children()):
                        if isinstance(child, nn.Linear):
                            packed = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                            packed.load_state_dict(child.state_dict())
                            setattr(module, name, packed.to("cpu"))
            return model

        return build

    def test_before_a_merge_the_adapter_is_exact(self, quantised, tmp_path):
        model = quantised()
        opt = lingrad.adapt(model, "svd(rank=4, every=0)", "adamw", lr=1e-2)
        train(model, opt, text_batches(3))
        before = {name: p.clone() for name, p in model.named_parameters()}
        report = bridge.export(opt, tmp_path / "a", quiet=True)
        assert len(report.rows) == 14
        assert report.residual < 1e-6
        assert report.outputs < 1e-5 * report.outputs_change + 1e-6  # float32
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
        loaded = peft.PeftModel.from_pretrained(quantised(), tmp_path / "a")
        ids = text_batches(1)[0][0]
        with torch.no_grad():
            # in an evaluation on a CPU bitsandbytes may compute in bfloat16
            assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=2e-2)

    def test_after_a_merge_it_is_measured_beside_its_base(self, quantised, tmp_path):
        model = quantised()
        opt = lingrad.adapt(model, "svd(rank=4, every=2)", "adamw", lr=1e-2, ledger=True)
        train(model, opt, text_batches(5))
        with pytest.raises(ExportError, match="what the run started from is gone"):
            bridge.export(opt, tmp_path / "a", allow_residual=1.0, quiet=True)
        with pytest.raises(ExportError, match="residual"):
            bridge.export(opt, tmp_path / "a", base=quantised(), quiet=True)
        report = bridge.export(opt, tmp_path / "a", base=quantised(), allow_residual=2.0, quiet=True)
        assert 0.01 < report.residual < 2.0  # what requantising rounded, beside a change of its size


class TestTheReport:
    def test_it_is_printed_and_written(self, tmp_path, capsys):
        _, opt = llama_run()
        report = bridge.export(opt, tmp_path / "a", base=llama())
        printed = capsys.readouterr().out
        assert printed == f"{report}\n"
        assert "model.layers.*.self_attn.q_proj.weight" in printed
        assert "2 x 16 random token ids" in printed
        found = json.loads((tmp_path / "a" / "lingrad_report.json").read_text())
        assert found["residual"] == report.residual
        assert found["outputs"] == report.outputs
        assert len(found["rows"]) == 14
        assert (
            sum(row["nbytes"] for row in found["rows"])
            < found["nbytes"]
            == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
        )

    def test_it_says_what_was_compared(self, tmp_path):
        _, opt = llama_run(spec="svd(rank=4, every=0)")
        assert bridge.export(opt, tmp_path / "a", quiet=True).base == "the run's frozen weights"
        assert bridge.export(opt, tmp_path / "b", base=llama(), quiet=True).base == "the base given"
        llama().save_pretrained(tmp_path / "base")
        assert str(tmp_path / "base") in bridge.export(opt, tmp_path / "c", base=tmp_path / "base", quiet=True).base
        assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            tmp_path / "base"
        )
        _, opt = llama_run()
        assert "base= would tell" in bridge.export(opt, tmp_path / "d", quiet=True).base

    def test_outputs_of_other_models_are_compared_on_inputs_only(self, tmp_path):
        _, opt = run_of("conv", SIDES[0])
        report = bridge.export(opt, tmp_path / "a", quiet=True)
        assert report.outputs is None
        assert "pass inputs=" in str(report)
        for i, inputs in enumerate((images(1)[0][0], (images(1)[0][0],), {"x": images(1)[0][0]})):
            assert bridge.export(opt, tmp_path / f"b{i}", inputs=inputs, quiet=True).outputs < 1e-12


class TestARunIsNotDisturbed:
    @pytest.mark.parametrize("mode", ["adapter", "optimizer"])
    @pytest.mark.parametrize("layerwise", [False, True])
    def test_by_an_export_in_the_middle_of_a_step(self, mode, layerwise, tmp_path):
        def trained(export):
            torch.manual_seed(0)
            model = gpt2()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.1
            make = lingrad.adapt if mode == "adapter" else lingrad.wrap
            rules = {"*.wpe": "svd(rank=3, every=2)", "*.h.*.c_*": "svd(rank=4, every=3)"}
            opt = make(model, rules, "adamw", lr=1e-2, ledger=True, layerwise=layerwise)
            seen = []
            model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
            model.train()
            for step, (ids,) in enumerate(text_batches(6, micro=1)):
                opt.zero_grad()
                if export and step == 4:
                    bridge.export(opt, tmp_path / f"{mode}{layerwise}before", quiet=True)
                text_loss(model, ids).backward()
                if export and step in (4, 5):
                    bridge.export(opt, tmp_path / f"{mode}{layerwise}{step}", quiet=True)
                assert model.training
                opt.step()
            return weights_of(opt), len(seen), torch.rand(1)

        plain, watched = trained(False), trained(True)
        assert all(torch.equal(plain[0][name], watched[0][name]) for name in plain[0])
        assert torch.equal(plain[2], watched[2])  # nobody drew from the global generator
        assert watched[1] == plain[1] + 3  # the run's own model runs once for each export, PEFT's copy has no foreign hooks

    def test_in_what_it_holds(self, tmp_path):
        model, opt = llama_run()
        before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
        keys, modes = list(model.state_dict()), [m.training for m in model.modules()]
        base = llama()
        start = {name: p.clone() for name, p in base.state_dict().items()}
        bridge.export(opt, tmp_path / "a", base=base, quiet=True)
        assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
        assert list(model.state_dict()) == keys
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(start[name], p) for name, p in base.state_dict().items())
        assert all(p.requires_grad for p in base.parameters())

    def test_nor_is_a_base_whose_biases_were_trained(self, tmp_path):
        _, opt = run_of("bert", SIDES[0])
        base = bert()
        report = bridge.export(opt, tmp_path / "a", base=base, quiet=True)
        assert len(report.beside) > 10
        assert all(torch.equal(a, b) for a, b in zip(base.parameters(), bert().parameters(), strict=True))


class TestDecayAndFewDigits:
    def test_decay_is_refused_with_its_size(self, tmp_path):
        _, opt = llama_run(weight_decay=0.1)
        with pytest.raises(ExportError, match=r"weight decay has left 0\.99\d+ .*allow_residual=0\.\d+ accepts it"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == []
        report = bridge.export(opt, tmp_path / "a", allow_residual=0.5, base=llama(), quiet=True)
        kept = opt.changes()["model.layers.0.mlp.up_proj.weight"].kept
        row = next(row for row in report.rows if row.name == "model.layers.0.mlp.up_proj.weight")
        assert row.kept == kept < 1
        # |1 - kept| |W| is what the factors lack of the change
        assert row.residual == pytest.approx((1 - kept) / row.change, rel=1e-6)
        assert "note" not in str(report)

    def test_bfloat16_before_a_merge_is_exact(self, tmp_path):
        _, opt = llama_run(dtype=torch.bfloat16, spec="svd(rank=4, every=0)")
        assert bridge.export(opt, tmp_path / "a", quiet=True).residual < 1e-6

    def test_bfloat16_that_was_merged_into_is_measured_beside_its_base(self, tmp_path):
        _, opt = llama_run("optimizer", torch.bfloat16)
        with pytest.raises(ExportError, match="bfloat16 and was merged into.*base=folder or model"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        with pytest.raises(ExportError, match="residual .* because merges into weights of so few digits were rounded"):
            bridge.export(opt, tmp_path / "a", base=llama(torch.bfloat16), quiet=True)
        report = bridge.export(opt, tmp_path / "a", base=llama(torch.bfloat16), allow_residual=0.2, quiet=True)
        assert 1e-3 < report.residual < 0.2
        assert bridge.export(opt, tmp_path / "b", allow_residual=1.0, quiet=True).residual < 0.2


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
        assert torch.allclose(loaded(x), opt._model(x), rtol=0, atol=1e-12)

    def test_a_weight_that_several_embeddings_share_is_saved_whole_in_each(self, tmp_path):
        from transformers import T5Config, T5ForConditionalGeneration

        def t5():
            torch.manual_seed(0)
            sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
            return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).double()

        model = t5()
        opt = lingrad.adapt(model, "svd(rank=2, every=2)", "adamw", lr=1e-2, ledger=True)
        train(model, opt, text_batches(3, micro=1), lambda model, ids: model(input_ids=ids, labels=ids).loss)
        report = bridge.export(opt, tmp_path / "a", base=t5(), quiet=True)
        assert {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"} <= set(report.whole)
        merged, trained = merged_by_peft(t5(), tmp_path / "a"), weights_of(opt)  # in the one, copies that are tied no more
        assert gap({name: merged[name] for name in trained}, trained) <= EXACT

    def test_a_tied_weight_is_saved_whole_in_both_places(self, tmp_path):
        model = CASES["tied"].build()
        opt = lingrad.adapt(model, {"*": "svd(rank=4, every=3)"}, "adamw", lr=1e-2, ledger=True)
        train(model, opt, text_batches(4))
        report = bridge.export(opt, tmp_path / "a", base=CASES["tied"].build(), quiet=True)
        assert {"lm_head", "model.embed_tokens"} <= set(report.whole)
        assert any("tied to lm_head.weight" in note for note in report.notes)
        assert gap(merged_by_peft(CASES["tied"].build(), tmp_path / "a"), weights_of(opt)) <= EXACT

    def test_parameters_whose_module_holds_adapters_are_saved_by_themselves(self, tmp_path):
        opt, report = tuned(fresh(_Root), "svd(rank=2)", self.X, tmp_path)
        assert set(report.beside) == {"scale", "inner.bias", "extra.0"}
        assert any("disable_adapter() leaves it there" in note for note in report.notes)
        loaded = peft.PeftModel.from_pretrained(fresh(_Root), tmp_path / "a")
        assert torch.allclose(loaded(self.X), opt._model(self.X), rtol=0, atol=1e-12)
        adapter = bridge.read_adapter(tmp_path / "a", fresh(_Root))
        assert set(adapter.full) == set(report.beside)

    def test_a_layer_that_is_read_but_not_called_is_noticed(self, tmp_path):
        with pytest.raises(ExportError, match="answers otherwise than the run"):
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
        assert torch.allclose(loaded(self.X), opt._model(self.X), rtol=0, atol=1e-12)

    def test_a_saved_name_that_peft_would_find_elsewhere(self, tmp_path):
        model = fresh(_Confusing).requires_grad_(False)
        model.norm.requires_grad_(True)
        model.my_proj.requires_grad_(True)
        with pytest.raises(ExportError, match="'norm' must be saved whole.*would take 'post_norm'"):
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
        with pytest.raises(ExportError, match="layers.1.mlp.up_proj.weight.*the base is not what the run started from"):
            bridge.export(opt, tmp_path / "a", base=other, quiet=True)
        with pytest.raises(ExportError, match="the base is another model: 'lm_head.weight' is"):
            bridge.export(opt, tmp_path / "a", base=llama(vocab_size=70), quiet=True)
        with pytest.raises(ExportError, match="'model.layers.2.*absent"):
            bridge.export(opt, tmp_path / "a", base=llama(num_hidden_layers=3), quiet=True)
        with pytest.raises(DataError, match="there is no folder"):
            bridge.export(opt, tmp_path / "a", base=tmp_path / "none", quiet=True)
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="cannot be read as a LlamaForCausalLM"):
            bridge.export(opt, tmp_path / "a", base=tmp_path / "empty", quiet=True)
        assert left_in(tmp_path) == ["empty"]

    def test_a_frozen_weight_that_differs_from_the_base(self, tmp_path):
        model = llama()
        model.model.norm.requires_grad_(False)
        opt = lingrad.adapt(model, "svd(rank=4)", "adamw", lr=1e-2)
        train(model, opt, text_batches(1))
        other = llama()
        nn.init.constant_(other.model.norm.weight, 2.0)
        with pytest.raises(ExportError, match="'model.norm.weight' was not trained, and differs"):
            bridge.export(opt, tmp_path / "a", base=other, quiet=True)

    def test_a_weight_that_somebody_else_changed(self, tmp_path):
        model, opt = llama_run("optimizer")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        with pytest.raises(ExportError, match="other programs changed the weight"):
            bridge.export(opt, tmp_path / "a", base=llama(), quiet=True)

    def test_keys_that_peft_would_only_warn_about(self, tmp_path, monkeypatch):
        _, opt = llama_run()
        monkeypatch.setattr("lingrad.peft.slots.PREFIX", "model.")
        with pytest.raises(ExportError, match="does not reproduce"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == []

    def test_a_config_that_targets_something_else(self, tmp_path, monkeypatch):
        _, opt = llama_run()
        monkeypatch.setattr("lingrad.peft.names.target_modules", lambda *_: ["q_proj"])
        with pytest.raises(ExportError, match="PEFT puts an adapter of a weight elsewhere than meant: none at model.layers"):
            bridge.export(opt, tmp_path / "a", quiet=True)

    def test_without_peft(self, tmp_path, monkeypatch):
        _, opt = llama_run()
        monkeypatch.setitem(__import__("sys").modules, "peft", None)
        with pytest.raises(DependencyError, match=r"^exporting to PEFT needs the package peft: pip install 'lingrad\[hf\]'$"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == []

    @pytest.mark.parametrize(
        "where", ["lingrad.peft.format.write_tensors", "lingrad.peft.format.write_whole", "lingrad.peft.report.Report.write"]
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


def lora(path, build, frozen=None, seed=3, **config):
    """An adapter of PEFT with random factors, saved."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(build(), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.copy_(torch.randn_like(param) * 0.1)
    model.save_pretrained(path)
    return path


def trained_by_peft(path, case, frozen, make, steps=6):
    model = peft.PeftModel.from_pretrained(case.build(), path, is_trainable=True)
    for name, param in model.named_parameters():
        if re.search(rf"lora_(embedding_)?{frozen}", name):
            param.requires_grad_(False)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, case.batches(steps), case.loss)
    return dict(model.merge_and_unload().named_parameters())


SGD = ("sgd", {"lr": 0.1}, lambda params: torch.optim.SGD(params, lr=0.1))
ADAMW = ("adamw", {"lr": 1e-2}, lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0))
LORAS = {
    "llama": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "modules_to_save": ["norm"],
        "rank_pattern": {"down_proj": 3},
    },
    # not the biases of keys, whose gradient is nothing but rounding
    "gpt2": {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
    "bert": {"target_modules": ["query", "dense"], "bias": "lora_only"},
    "conv": {"target_modules": ["first", "third"], "modules_to_save": ["head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
}


class TestGoingOnFromAnAdapter:
    @pytest.mark.parametrize("base", [pytest.param(SGD, id="sgd", marks=pytest.mark.slow), pytest.param(ADAMW, id="adamw")])
    @pytest.mark.parametrize("frozen", ["A", "B"])
    @pytest.mark.parametrize("kind", LORAS)
    def test_both_modes_train_as_peft_does_with_that_factor_frozen(self, kind, frozen, base, tmp_path):
        case, (name, options, make) = CASES[kind], base
        path = lora(tmp_path / "lora", case.build, r=4, lora_alpha=10, use_rslora=True, **LORAS[kind])
        expected = trained_by_peft(path, case, frozen, make)
        for mode in ("adapter", "optimizer"):
            model = case.build()
            opt = bridge.load(path, model, name, mode=mode, frozen=frozen, **options)
            assert opt.mode == mode
            train(model, opt, case.batches(6), case.loss)
            bridge.export(opt, tmp_path / mode, base=case.build(), quiet=True)
            again = bridge.read_adapter(tmp_path / mode, case.build())
            assert {p.frozen for p in again.low_rank.values()} == {frozen}
            opt.detach()
            found = dict(model.named_parameters())
            assert gap(found, expected) <= EXACT
            assert gap(merged_by_peft(case.build(), tmp_path / mode), expected) <= EXACT

    @pytest.mark.parametrize(
        ("saved", "config"), [(True, {}), ("auto", {"layers_to_transform": [1]})], ids=["embeddings", "some layers"]
    )
    def test_what_the_adapter_does_not_train_stays(self, saved, config, tmp_path):
        """PEFT saves embeddings that it does not train, if it is told to; and has adapters in some layers only."""
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=3, **config))
        model.save_pretrained(tmp_path / "lora", save_embedding_layers=saved)
        expected = trained_by_peft(tmp_path / "lora", CASES["llama"], "A", ADAMW[2])
        for mode in ("adapter", "optimizer"):
            model = llama()
            opt = bridge.load(tmp_path / "lora", model, lr=1e-2, mode=mode, frozen="A")
            train(model, opt, text_batches(6, micro=1))
            opt.detach()
            assert gap(dict(model.named_parameters()), expected) <= EXACT

    def test_it_starts_as_peft_has_it(self, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["q_proj"], r=3, lora_alpha=7)
        expected = merged_by_peft(llama(), path)
        for mode in ("adapter", "optimizer"):
            model = llama()
            opt = bridge.load(path, model, lr=1e-2, mode=mode, frozen="A")
            assert set(opt.weights()) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
            assert gap(opt.weights(), {name: expected[name] for name in opt.weights()}) <= EXACT
            assert [n for n, p in model.named_parameters() if p.requires_grad and "coords" not in n] == []
            change = opt.changes()["model.layers.0.self_attn.q_proj.weight"]
            assert change.factors.rank == 3

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("mode", ["adapter", "optimizer"])
    def test_a_run_goes_on_from_its_own_export(self, side, mode, tmp_path):
        """SGD remembers nothing, so that a run that is exported and loaded is the run that went on."""
        spec = f"svd(rank=4, every=0, side={side})"
        batches = text_batches(8, micro=1)
        weights = []
        for stop in (False, True):
            model = llama()
            opt = lingrad.adapt(model, spec, "sgd", lr=0.5)
            train(model, opt, batches[:4], schedule=False)
            if stop:
                bridge.export(opt, tmp_path / "a", quiet=True)
                model = llama()
                opt = bridge.load(tmp_path / "a", model, "sgd", lr=0.5, mode=mode)
            train(model, opt, batches[4:], schedule=False)
            weights.append(weights_of(opt))
        assert gap(*weights) <= EXACT

    @pytest.mark.parametrize("kind", ["mixtral", "qwen", "gpt_oss"])
    def test_fused_experts_of_a_run_go_on(self, kind, tmp_path):
        case = CASES[kind]
        _, opt = run_of(kind, "svd(rank=4, every=0, side=right)")
        bridge.export(opt, tmp_path / "a", quiet=True)
        expected, weights = weights_of(opt), []
        for mode in ("adapter", "optimizer"):
            model = case.build()
            opt = bridge.load(tmp_path / "a", model, lr=1e-2, mode=mode)
            assert gap(weights_of(opt), expected) <= EXACT
            train(model, opt, case.batches(4), case.loss)
            weights.append(weights_of(opt))
        assert gap(*weights) <= EXACT
        assert gap(weights[0], expected) > 1e-3

    @pytest.mark.parametrize(("kind", "frozen"), [("mixtral", "B"), ("gpt_oss", "A")])
    def test_fused_experts_of_peft_train_as_it_does(self, kind, frozen, tmp_path):
        case = CASES[kind]
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        path = lora(tmp_path / "lora", case.build, target_modules=["q_proj"], target_parameters=names, r=2, lora_alpha=6)
        _, options, make = ADAMW
        expected = trained_by_peft(path, case, frozen, make)
        for mode in ("adapter", "optimizer"):
            model = case.build()
            opt = bridge.load(path, model, mode=mode, frozen=frozen, **options)
            train(model, opt, case.batches(6), case.loss)
            opt.detach()
            assert gap(dict(model.named_parameters()), expected) <= EXACT
        with pytest.raises(DualityError, match=f"frozen='{frozen}'"):
            bridge.load(path, case.build(), frozen="AB".replace(frozen, ""), lr=1e-2)

    @pytest.mark.parametrize(
        "spec", ["svd(rank=4, every=3, side=left)", "power(rank=4, every=2, side=left)", "pca(rank=4, side=left)"]
    )
    def test_the_basis_is_the_adapters_until_the_first_refresh(self, spec, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["q_proj", "down_proj"], r=4, lora_alpha=4)
        every = lingrad.spec.parse(spec).every
        weights = []
        for mode in ("adapter", "optimizer"):
            model = llama()
            opt = bridge.load(path, model, lr=1e-2, mode=mode, spec=spec, frozen="B", carry="rotate")
            sub = opt.subspaces[0]
            first = sub.map().left.clone()
            for step, (ids,) in enumerate(text_batches(7, micro=1)):
                opt.zero_grad()
                text_loss(model, ids).backward()
                if step < every:
                    assert torch.equal(sub.map().left, first)
                opt.step()
            assert not torch.equal(sub.map().left, first)
            weights.append(weights_of(opt))
            bridge.export(opt, tmp_path / mode, base=llama(), quiet=True)
            assert (
                gap({n: w for n, w in merged_by_peft(llama(), tmp_path / mode).items() if n in weights[0]}, weights[0]) <= EXACT
            )
        assert gap(*weights) <= EXACT

    @pytest.mark.parametrize("mode", ["adapter", "optimizer"])
    @pytest.mark.parametrize("spec", [None, "svd(rank=4, every=3, side=right)"])
    def test_it_resumes(self, mode, spec, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["q_proj", "down_proj"], r=4)
        batches, weights = text_batches(8, micro=1), []
        for stop in (False, True):
            model = llama()
            opt = bridge.load(path, model, lr=1e-2, mode=mode, spec=spec, frozen="A")
            train(model, opt, batches[:4], schedule=False)
            if stop:
                saved = model.state_dict(), opt.state_dict()
                model = llama()
                opt = bridge.load(path, model, lr=1e-2, mode=mode, spec=spec, frozen="A")
                model.load_state_dict(saved[0])
                opt.load_state_dict(saved[1])
            train(model, opt, batches[4:], schedule=False)
            weights.append(weights_of(opt))
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_an_adapter_of_more_digits_than_the_weights(self, tmp_path):
        path = lora(tmp_path / "lora", lambda: llama(torch.float32), target_modules=["q_proj"], r=4)
        model = llama(torch.bfloat16)
        opt = bridge.load(path, model, lr=1e-3, frozen="A")
        expected = bridge.read_adapter(path, llama())
        for name, change in opt.changes().items():
            assert torch.allclose(change.factors.dense(), expected.low_rank[name].factors.dense(), rtol=1e-6, atol=1e-7)


class TestAdaptersThatCannotGoOn:
    def test_which_factor_must_be_said(self, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["q_proj"])
        with pytest.raises(SpecError, match="frozen='A' trains lora_B"):
            bridge.load(path, llama())
        with pytest.raises(SpecError, match="frozen must be A or B"):
            bridge.load(path, llama(), frozen="C")
        with pytest.raises(SpecError, match="mode must be one of"):
            bridge.load(path, llama(), frozen="A", mode="both")

    def test_a_spec_that_does_not_fit(self, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["q_proj"], r=4)
        model = llama()
        model.model.norm.requires_grad_(False)
        for spec, message in (
            ("svd(rank=8, side=right)", "use rank=4 and side=right"),
            ("svd(rank=4, side=left)", "use rank=4 and side=right"),
            ("random(rank=4, side=right)", "random draws its bases"),
        ):
            with pytest.raises(SpecError, match=message):
                bridge.load(path, model, frozen="A", spec=spec, lr=1e-2)
        for option in ("stagger", "share"):
            with pytest.raises(SpecError, match=f"{option} chooses bases"):
                bridge.load(path, model, frozen="A", **{option: True if option == "stagger" else "input"})
        with pytest.raises(SpecError, match="lr"):
            bridge.load(path, model, frozen="A", lr=-1.0)
        # nothing of it was left behind
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), llama().parameters(), strict=True))
        assert bridge.load(path, model, frozen="A", lr=1e-2).mode == "adapter"

    def test_dropout(self, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["q_proj"], lora_dropout=0.1)
        with pytest.raises(DualityError, match="lora_dropout=0.1.*set it to 0"):
            bridge.load(path, llama(), frozen="A")
        assert bridge.read_adapter(path, llama()).dropout == 0.1  # for a merge it does not matter

    def test_a_rank_that_no_weight_has(self, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["k_proj"], r=20)
        with pytest.raises(SpecError, match="rank 20, more than the 16"):
            bridge.load(path, llama(), frozen="A")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("mode", MODES)
    def test_out_and_in_again(self, mode, tmp_path):
        case = CASES["llama"]
        model = case.build().cuda()
        opt = (lingrad.adapt if mode == "adapter" else lingrad.wrap)(model, SIDES[1], lr=1e-2, ledger=True)
        batches = [[ids.cuda() for ids in step] for step in case.batches(6)]
        train(model, opt, batches, case.loss)
        drawn = torch.cuda.get_rng_state()
        report = bridge.export(opt, tmp_path / "a", base=case.build().cuda(), quiet=True)
        assert report.residual <= 1e-10
        assert torch.equal(torch.cuda.get_rng_state(), drawn)
        again = case.build().cuda()
        other = bridge.load(tmp_path / "a", again, lr=1e-2, mode=mode)
        assert gap(weights_of(other), weights_of(opt)) <= EXACT
        train(again, other, batches, case.loss)


class TestTheDocs:
    def test_python_on_the_page_runs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        llama(torch.float32).save_pretrained("base")
        page = (ROOT / "docs/peft.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
        assert len(blocks) >= 3
        names = {"batches": [ids for (ids,) in text_batches(3, micro=1)], "torch": torch}
        for block in blocks:
            exec(compile(block, "docs/peft.md", "exec"), names)  # noqa: S102 - our own text
        for word in ("allow_residual", "whole=True", "frozen=", "ledger=True", "modules_to_save"):
            assert word in page
