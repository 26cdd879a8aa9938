"""Adapters for PEFT: what PEFT itself makes of them is the oracle."""

import json
import re

import pytest
import torch
from torch import nn

import lingrad
from lingrad import peft as bridge
from lingrad.errors import ExportError, ModeError, SpecError
from lingrad.weights.layout import layout_of
from tests.support.models import gap, gpt2, llama, text_batches, text_loss, train
from tests.support.peft_models import CASES, bert, conv, images
from tests.support.peft_runs import EXACT, MODES, ROOT, SIDES, SPECS, left_in, llama_run, merged_by_peft, peft, run_of, slow
from tests.support.runs import weights_of


class TestWhatPeftMakesOfIt:
    @pytest.mark.thinned(3)
    @pytest.mark.parametrize(
        ("spec", "mode"), [*zip(SIDES, MODES, strict=True), *(slow(*pair) for pair in zip(SIDES, MODES[::-1], strict=True))]
    )
    @pytest.mark.parametrize("kind", CASES)
    def test_merged_by_peft_it_is_the_trained_model(self, kind, spec, mode, tmp_path):
        self.check(kind, spec, mode, tmp_path)

    @pytest.mark.thinned(3)
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
        report = bridge.export(opt, tmp_path / "a", start=case.build(), inputs=inputs, quiet=True)
        trained = weights_of(opt)
        assert gap(trained, {name: start[name] for name in trained}) > 1e-3
        merged = merged_by_peft(case.build(), tmp_path / "a")
        assert gap({name: merged[name] for name in trained}, trained) <= EXACT
        # six steps with a refresh every three (or two, on one side of kron): every basis has left its columns
        columns = 12 if spec.startswith("kron") else 8
        for row in report.low_rank:  # more columns than a weight has are as many as it needs, at most all
            module = opt.model.get_submodule(row.name.rpartition(".")[0])
            most = min(layout_of(start[row.name], module, row.name).shape)
            assert row.rank == columns if columns <= most else row.rank <= most
        assert report.largest_residual <= 1e-10
        assert report.outputs.difference <= 1e-7 * report.outputs.change  # float32 norms inside some models; elsewhere 1e-16

    @pytest.mark.parametrize("mode", ["adapter", "optimizer"])
    def test_in_float32(self, mode, tmp_path):
        _, opt = llama_run(mode, torch.float32, steps=7)
        report = bridge.export(opt, tmp_path / "a", start=llama(torch.float32), quiet=True)
        assert report.largest_residual <= 1e-5  # a rounding of 6e-8 of the weight a step, where the change is a tenth of it
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

    @pytest.mark.parametrize("by_rule", [False, True])
    def test_only_what_was_trained_is_in_it(self, tmp_path, by_rule):
        model, rules = llama(), "svd(rank=4, every=0)"
        if by_rule:
            rules = {"*.layers.1.mlp.*": rules, "*": "frozen"}
        else:
            model.requires_grad_(False)
            model.model.layers[1].mlp.requires_grad_(True)
        opt = lingrad.adapt(model, rules, "adamw", lr=1e-2)
        train(model, opt, text_batches(3))
        report = bridge.export(opt, tmp_path / "a", quiet=True)
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["target_modules"] == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
        assert config["modules_to_save"] is None
        assert report.saved_modules == report.alongside == ()
        assert (
            gap({n: p for n, p in merged_by_peft(llama(), tmp_path / "a").items() if n in opt.weights()}, opt.weights())
            <= EXACT
        )

    def test_of_what_trains_in_full_only_what_changed_is_in_it_where_the_base_is_known(self, tmp_path):
        model = llama()
        opt = lingrad.adapt(model, "svd(rank=4, every=0)", "adamw", lr=1e-2)
        opt.param_groups[1]["lr"] = 0.0  # embeddings and the head
        train(model, opt, text_batches(2), schedule=False)
        report = bridge.export(opt, tmp_path / "a", start=llama(), quiet=True)
        assert not {"lm_head", "model.embed_tokens"} & set(report.saved_modules)
        assert "model.norm" in report.saved_modules
        assert {"lm_head", "model.embed_tokens"} <= set(bridge.export(opt, tmp_path / "b", quiet=True).saved_modules)

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
        assert {row.rank for row in report.low_rank} == {2, 3, 32}
        assert gap(merged_by_peft(llama(), tmp_path / "a"), weights_of(opt)) <= EXACT

    def test_no_more_columns_than_a_weight_has(self, tmp_path):
        _, opt = llama_run(spec="svd(rank=16, every=1)", steps=5)
        report = bridge.export(opt, tmp_path / "a", start=llama(), quiet=True)
        assert {row.rank for row in report.low_rank} == {
            16,
            32,
        }  # keys and values have 16 rows; of the others 80 columns were noted
        assert gap(merged_by_peft(llama(), tmp_path / "a"), weights_of(opt)) <= EXACT

    def test_a_rank_that_is_asked_for(self, tmp_path):
        _, opt = llama_run(steps=6)
        with pytest.raises(ExportError, match="residual"):
            bridge.export(opt, tmp_path / "a", rank=6, quiet=True)
        report = bridge.export(opt, tmp_path / "a", rank=6, allow_residual=1.0, start=llama(), quiet=True)
        assert {row.rank for row in report.low_rank} == {6}
        for row in report.low_rank:
            values = torch.linalg.svdvals(opt.changes()[row.name].factors.dense())
            assert row.residual == pytest.approx(float(values[6:].norm() / values.norm()), rel=1e-6)  # Eckart-Young
        with pytest.raises(SpecError, match="rank must be a whole number"):
            bridge.export(opt, tmp_path / "b", rank=0)

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"rank": 2}, "the largest rank is 2, and its change has up to 8"),
            ({"dtype": torch.bfloat16}, "factors in bfloat16"),
        ],
    )
    def test_what_was_asked_for_is_named_as_the_cause(self, options, why, tmp_path):
        _, opt = llama_run()
        for base in (None, llama()):
            with pytest.raises(ExportError, match=f"{why}.*allow_residual=.* accepts it"):
                bridge.export(opt, tmp_path / "a", start=base, quiet=True, **options)
        assert left_in(tmp_path) == []

    @pytest.mark.parametrize(
        "options",
        [{"dtype": "bfloat16"}, {"dtype": torch.int8}, {"allow_residual": -1}, {"allow_residual": "1"}, {"rank": 2.0}],
    )
    def test_options_of_another_type(self, options, tmp_path):
        _, opt = llama_run()
        with pytest.raises(SpecError, match=f"^{next(iter(options))} must be a "):
            bridge.export(opt, tmp_path / "a", quiet=True, **options)

    @pytest.mark.parametrize("start", [5, [llama], {"base": 1}])
    def test_a_start_of_another_type(self, start, tmp_path):
        _, opt = llama_run()
        with pytest.raises(SpecError, match="^start must be a folder or a model, not ") as caught:
            bridge.export(opt, tmp_path / "a", start=start, quiet=True)
        assert caught.value.option == "start"
        assert left_in(tmp_path) == []

    def test_the_old_name_of_start(self, tmp_path):
        _, opt = llama_run()
        with pytest.warns(DeprecationWarning, match="base of lingrad.peft.export is deprecated; use start") as caught:
            report = bridge.export(opt, tmp_path / "a", base=llama(), quiet=True)
        assert report.start == "the start given"
        assert caught[0].filename == __file__
        with pytest.raises(SpecError, match="got base, which is now called start, and start; leave base out"):
            bridge.export(opt, tmp_path / "b", base=llama(), start=llama(), quiet=True)
        assert not (tmp_path / "b").exists()

    def test_from_the_model_and_its_changes(self, tmp_path):
        model, opt = run_of("gpt2", SIDES[0])
        changes = opt.changes()
        opt.detach()
        report = bridge.export((model, changes), tmp_path / "a", start=gpt2(), quiet=True)
        assert report.largest_residual <= 1e-10
        assert gap(merged_by_peft(gpt2(), tmp_path / "a"), dict(model.named_parameters())) <= EXACT
        plain = {name: change.factors for name, change in changes.items()}
        assert bridge.export((model, plain), tmp_path / "b", quiet=True).largest_residual <= 1e-10

    def test_batch_statistics_go_with_their_module(self, tmp_path):
        case = CASES["conv"]
        model = case.build()
        model.norm.requires_grad_(False)
        opt = lingrad.adapt(model, {"second": "svd(rank=4, every=0)", "*": "none"}, "adamw", lr=1e-2)
        train(model, opt, case.batches(3), case.loss)
        report = bridge.export(opt, tmp_path / "a", inputs=images(1)[0][0], quiet=True)
        assert "norm" in report.saved_modules
        loaded = peft.PeftModel.from_pretrained(conv(), tmp_path / "a").eval()
        model.eval()
        x = images(1)[0][0]
        assert torch.allclose(loaded(x), model(x), rtol=0, atol=1e-12)

    def test_factors_in_another_dtype(self, tmp_path):
        _, opt = llama_run(dtype=torch.float32)
        with pytest.raises(ExportError, match="residual"):
            bridge.export(opt, tmp_path / "a", dtype=torch.bfloat16, quiet=True)
        report = bridge.export(opt, tmp_path / "a", dtype=torch.bfloat16, allow_residual=0.01, quiet=True)
        assert 1e-4 < report.largest_residual < 4e-3  # of two factors each is rounded to eight bits, 2^-9 at most
        exact = bridge.export(opt, tmp_path / "b", quiet=True)
        assert sum(row.nbytes for row in report.low_rank) * 2 == sum(row.nbytes for row in exact.low_rank)


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
        assert len(report.low_rank) == 14
        assert report.largest_residual < 1e-6
        assert report.outputs.difference < 1e-5 * report.outputs.change + 1e-6  # float32
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
        with pytest.raises(ExportError, match="the weights the run started from are gone"):
            bridge.export(opt, tmp_path / "a", allow_residual=1.0, quiet=True)
        with pytest.raises(ExportError, match="residual"):
            bridge.export(opt, tmp_path / "a", start=quantised(), quiet=True)
        report = bridge.export(opt, tmp_path / "a", start=quantised(), allow_residual=2.0, quiet=True)
        assert 0.01 < report.largest_residual < 2.0  # what requantising rounded, beside a change of its size


class TestTheReport:
    def test_it_is_printed_and_written(self, tmp_path, capsys):
        _, opt = llama_run()
        report = bridge.export(opt, tmp_path / "a", start=llama())
        printed = capsys.readouterr().out
        assert printed == f"{report}\n"
        assert "model.layers.*.self_attn.q_proj.weight" in printed
        assert "2 x 16 random token ids" in printed
        found = json.loads((tmp_path / "a" / "lingrad_report.json").read_text())
        assert max(row["residual"] for row in found["rows"]) == report.largest_residual
        assert found["residual"] == report.residual <= report.largest_residual
        assert found["outputs"]["difference"] == report.outputs.difference
        assert found["outputs"]["change"] == report.outputs.change
        low = [row for row in found["rows"] if row["kind"] == "low_rank"]
        assert len(low) == 14
        assert {row["name"] for row in found["rows"]} == set(opt.weights())
        assert (
            sum(row["nbytes"] for row in low) < found["nbytes"] == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
        )

    def test_it_says_what_was_compared(self, tmp_path):
        _, opt = llama_run(spec="svd(rank=4, every=0)")
        assert bridge.export(opt, tmp_path / "a", quiet=True).start == "the run's frozen weights"
        assert bridge.export(opt, tmp_path / "b", start=llama(), quiet=True).start == "the start given"
        llama().save_pretrained(tmp_path / "base")
        assert str(tmp_path / "base") in bridge.export(opt, tmp_path / "c", start=tmp_path / "base", quiet=True).start
        assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            tmp_path / "base"
        )
        _, opt = llama_run()
        assert "only start= can show" in bridge.export(opt, tmp_path / "d", quiet=True).start

    def test_outputs_of_other_models_are_compared_on_inputs_only(self, tmp_path):
        _, opt = run_of("conv", SIDES[0])
        report = bridge.export(opt, tmp_path / "a", quiet=True)
        assert report.outputs is None
        assert "pass inputs=" in str(report)
        for i, inputs in enumerate((images(1)[0][0], (images(1)[0][0],), {"x": images(1)[0][0]})):
            assert bridge.export(opt, tmp_path / f"b{i}", inputs=inputs, quiet=True).outputs.difference < 1e-12


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
        bridge.export(opt, tmp_path / "a", start=base, quiet=True)
        assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
        assert list(model.state_dict()) == keys
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(start[name], p) for name, p in base.state_dict().items())
        assert all(p.requires_grad for p in base.parameters())

    def test_nor_is_a_base_whose_biases_were_trained(self, tmp_path):
        _, opt = run_of("bert", SIDES[0])
        base = bert()
        report = bridge.export(opt, tmp_path / "a", start=base, quiet=True)
        assert len(report.alongside) > 10
        assert all(torch.equal(a, b) for a, b in zip(base.parameters(), bert().parameters(), strict=True))


class TestDecayAndFewDigits:
    def test_decay_is_refused_with_its_size(self, tmp_path):
        _, opt = llama_run(weight_decay=0.1)
        with pytest.raises(
            ExportError,
            match=r"weight decay has multiplied the starting weight by 0\.99\d+, .*allow_residual=0\.\d+ accepts it",
        ):
            bridge.export(opt, tmp_path / "a", quiet=True)
        assert left_in(tmp_path) == []
        report = bridge.export(opt, tmp_path / "a", allow_residual=0.5, start=llama(), base_model="org/model", quiet=True)
        decay = opt.changes()["model.layers.0.mlp.up_proj.weight"].decay
        row = next(row for row in report.low_rank if row.name == "model.layers.0.mlp.up_proj.weight")
        assert row.decay == decay < 1
        # |1 - decay| |W| is what the factors lack of the change
        assert row.residual == pytest.approx((1 - decay) / row.change, rel=1e-6)
        assert "note" not in str(report)

    def test_bfloat16_before_a_merge_is_exact(self, tmp_path):
        _, opt = llama_run(dtype=torch.bfloat16, spec="svd(rank=4, every=0)")
        assert bridge.export(opt, tmp_path / "a", quiet=True).largest_residual < 1e-6

    def test_bfloat16_that_was_merged_into_is_measured_beside_its_base(self, tmp_path):
        _, opt = llama_run("optimizer", torch.bfloat16)
        with pytest.raises(ExportError, match="bfloat16 and was merged into.*start=folder or model"):
            bridge.export(opt, tmp_path / "a", quiet=True)
        with pytest.raises(ExportError, match="residual .* because merges into weights in bfloat16 were rounded"):
            bridge.export(opt, tmp_path / "a", start=llama(torch.bfloat16), quiet=True)
        report = bridge.export(opt, tmp_path / "a", start=llama(torch.bfloat16), allow_residual=0.2, quiet=True)
        assert 1e-3 < report.largest_residual < 0.2
        assert bridge.export(opt, tmp_path / "b", allow_residual=1.0, quiet=True).largest_residual < 0.2


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
        report = bridge.export(opt, tmp_path / "a", start=case.build().cuda(), quiet=True)
        assert report.largest_residual <= 1e-10
        assert torch.equal(torch.cuda.get_rng_state(), drawn)
        again = case.build().cuda()
        other = bridge.load(tmp_path / "a", again, lr=1e-2, mode=mode)
        assert gap(weights_of(other), weights_of(opt)) <= EXACT
        train(again, other, batches, case.loss)


class TestTheDocs:
    def test_python_on_the_page_runs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        llama(torch.float32).save_pretrained("start")
        page = (ROOT / "docs/peft.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
        assert len(blocks) >= 3
        names = {"batches": [ids for (ids,) in text_batches(3, micro=1)], "torch": torch}
        for block in blocks:
            exec(compile(block, "docs/peft.md", "exec"), names)  # noqa: S102 - our own text
        for word in ("allow_residual", "whole=True", "frozen=", "ledger=True", "modules_to_save"):
            assert word in page


@pytest.mark.parametrize("kind", ["Llama", pytest.param("Bart", marks=pytest.mark.slow)])
def test_classifiers_that_pool_at_a_token_are_compared_by_themselves(kind, tmp_path):
    """Without a padding token one row is taken at a time; BART's rows must have as many end tokens, and have one at the end."""
    import transformers

    sizes = {
        "Llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "Bart": {"d_model": 16, "encoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64},
    }
    config = getattr(transformers, f"{kind}Config")(vocab_size=8, num_labels=3, **sizes[kind])
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()
    run = lingrad.wrap(model, "svd(rank=2)", lr=1e-2, ledger=True)
    ids = torch.tensor([[3, 4, 5, 2]])
    model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    run.step()
    outputs = lingrad.peft.export(run, tmp_path / "adapter").outputs
    assert outputs.inputs == f"{1 if kind == 'Llama' else 2} x 16 random token ids"
    assert outputs.difference < 1e-12  # float64, sums in another order
    assert outputs.change > 1e-6
