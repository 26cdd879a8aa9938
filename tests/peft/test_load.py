"""Runs that start from an adapter; PEFT's own training with the other factor frozen is the oracle."""

import re

import pytest
import torch

import lingrad
from lingrad import peft as bridge
from lingrad.errors import DualityError, SpecError
from tests.support.models import gap, llama, text_batches, text_loss, train
from tests.support.peft_models import CASES
from tests.support.peft_runs import EXACT, merged_by_peft, peft, run_of
from tests.support.runs import weights_of


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
            bridge.export(opt, tmp_path / mode, start=case.build(), quiet=True)
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
            wrapped = list(opt.weights()) if mode == "optimizer" else []  # they train, by their coordinates
            assert [n for n, p in model.named_parameters() if p.requires_grad and "coords" not in n] == wrapped
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
        "spec",
        [
            "svd(rank=4, every=3, side=left)",
            "power(rank=4, every=2, side=left)",
            "pca(rank=4, side=left)",
            "svd(rank=4, every=3, side=left, schedule=path(threshold=1.0))",
            "power(rank=4, every=3, side=left, schedule=energy)",
            "svd(rank=4, every=3, side=left, schedule=overlap)",
        ],
    )
    def test_the_basis_is_the_adapters_until_the_first_refresh(self, spec, tmp_path):
        path = lora(tmp_path / "lora", llama, target_modules=["q_proj", "down_proj"], r=4, lora_alpha=4)
        every = lingrad.config.spec.parse(spec).every
        weights = []
        for mode in ("adapter", "optimizer"):
            model = llama()
            opt = bridge.load(path, model, lr=1e-2, mode=mode, rules=spec, frozen="B", carry="rotate")
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
            bridge.export(opt, tmp_path / mode, start=llama(), quiet=True)
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
            opt = bridge.load(path, model, lr=1e-2, mode=mode, rules=spec, frozen="A")
            train(model, opt, batches[:4], schedule=False)
            if stop:
                saved = model.state_dict(), opt.state_dict()
                model = llama()
                opt = bridge.load(path, model, lr=1e-2, mode=mode, rules=spec, frozen="A")
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
            ("random(rank=4, side=right)", "random computes its bases"),
        ):
            with pytest.raises(SpecError, match=message):
                bridge.load(path, model, frozen="A", rules=spec, lr=1e-2)
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
