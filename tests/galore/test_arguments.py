"""The Trainer's own GaLore configurations, translated: the same modules, the same run, what is unknown refused."""

import pytest
import torch
from torch import nn

import lingrad
import lingrad.hf
from lingrad.errors import SpecError
from tests.support.models import gap, gpt2, llama
from tests.support.trainers import arguments, examples, make, quietly, weights

GUIDE = {
    "optim": "galore_adamw_8bit_layerwise",
    "optim_target_modules": ["attn", "mlp"],
    "optim_args": "rank=1024, update_proj_gap=200, scale=2",
}


def galore(folder, **options):
    return arguments(folder, **{"optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"], **options})


def test_the_guides_configuration(tmp_path):
    """https://huggingface.co/blog/galore, 2024."""
    rules, options = lingrad.hf.from_galore_args(arguments(tmp_path, **GUIDE))
    assert rules.spec == "svd(rank=1024, clip=true)"
    assert options == {"base": "adamw8bit", "scale": 2.0, "layerwise": True}
    chosen = rules(llama(torch.float32))
    assert len(chosen) == 14
    assert "model.layers.1.mlp.down_proj.weight" in chosen
    assert "lm_head.weight" not in chosen


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_it_trains_as_it_stands(tmp_path, mode):
    """But for the rank: 1024 of a layer of 32 is all of it."""
    args = {**GUIDE, "optim_args": "rank=4,update_proj_gap=3,scale=2", "learning_rate": 1e-3}
    rules, options = lingrad.hf.from_galore_args(arguments(tmp_path, **args))
    with pytest.warns(UserWarning, match="max_grad_norm=1.0 has no effect"):
        trainer = make(tmp_path, rules, args=args, mode=mode, min_8bit_size=16, **options)
    start = {name: param.clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    opt = lingrad.hf.optimizer_of(trainer)
    assert {sub.name for sub in opt.subspaces} == rules(llama()).keys()
    assert next(iter(opt.state.values()))["state1"].dtype == torch.uint8
    found = weights(trainer)
    assert all(not torch.equal(found[name], param) for name, param in start.items())
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(rates)) > 5  # the schedule reaches it


@pytest.mark.parametrize(("optim", "base", "layerwise"), [
    ("galore_adamw", "adamw", False), ("galore_adamw_layerwise", "adamw", True), ("galore_adamw_8bit", "adamw8bit", False),
    ("galore_adafactor", "adafactor", False), ("galore_adafactor_layerwise", "adafactor", True),
])  # fmt: skip
def test_every_name(tmp_path, optim, base, layerwise):
    args = galore(tmp_path, optim=optim, max_grad_norm=0)
    rules, options = lingrad.hf.from_galore_args(args)
    assert (options["base"], options.get("layerwise", False), options["scale"]) == (base, layerwise, 0.25)
    assert rules.spec == "svd(rank=128, clip=true)"  # the Trainer's defaults
    lingrad.hf.trainer_kwargs(rules, args, **options)


def tied(dtype):
    return llama(dtype, tie_word_embeddings=True)


class TestModules:
    """Which layers are meant: asked of transformers itself."""

    @pytest.mark.parametrize(
        "build", [llama, gpt2, lambda dtype: llama(dtype, tie_word_embeddings=True)], ids=["llama", "gpt2", "tied"]
    )
    @pytest.mark.parametrize("modules", [
        ["attn", "mlp"], ["q_proj", "v_proj"], r".*\.(self_attn|mlp)\..*", ["model.layers.0.mlp.up_proj"], "all-linear",
        "all_linear", [r".*layers\.1.*proj", "lm_"], ["layers.0"], ["proj"], "lm_head", ["weight"], ["e"],
    ], ids=str)  # fmt: skip
    def test_the_same_set(self, tmp_path, build, modules):
        from transformers.trainer_optimizer import _setup_low_rank_optimizer

        args, model = galore(tmp_path, optim_target_modules=modules), build(torch.float32)
        rules, _ = lingrad.hf.from_galore_args(args)
        names = {id(param): name for name, param in model.named_parameters()}
        try:
            _, theirs = _setup_low_rank_optimizer(args, model, "galore", {"galore": None}, {"rank": 4}, {})
        except ValueError:
            with pytest.raises(SpecError, match="selects no trainable linear layer"):
                rules(model)
            return
        expected = {names[id(param)] for param in theirs["params"][1]["params"]}
        if not expected:  # an empty group, which theirs trains in full without a word
            with pytest.raises(SpecError, match="selects no trainable linear layer"):
                rules(model)
            return
        assert rules(model).keys() == expected
        opt = lingrad.wrap(model, rules(model), lr=1e-3)
        assert {sub.name for sub in opt.subspaces} == expected

    def test_frozen_layers_stay_frozen(self, tmp_path):
        model = llama(torch.float32)
        model.model.layers[0].requires_grad_(False)
        rules, _ = lingrad.hf.from_galore_args(galore(tmp_path))
        assert all(".layers.1." in name for name in rules(model))


@pytest.mark.thinned(3)
@pytest.mark.peers
@pytest.mark.parametrize(("proj_type", "layerwise"), [
    ("std", False), ("std", True), ("reverse_std", False), ("left", False), ("right", False),
])  # fmt: skip
def test_as_published_is_the_trainers_own_run(tmp_path, proj_type, layerwise):
    """No lingrad in the one, no galore_torch in the other. Theirs, layerwise, sees no schedule, and clips nothing."""
    pytest.importorskip("galore_torch")
    from transformers import Trainer

    given = {
        "optim": "galore_adamw_layerwise" if layerwise else "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": f"rank=4, update_proj_gap=3, scale=0.5, proj_type={proj_type}",
        "weight_decay": 0.3,  # which theirs drops
        "adam_beta2": 0.5,
        "max_grad_norm": 0,
        **({"lr_scheduler_type": "constant", "warmup_steps": 0} if layerwise else {}),
    }
    args = arguments(tmp_path, **given)
    theirs = Trainer(llama(torch.float32), args, train_dataset=examples())
    theirs.train()
    expected = {name: param.detach() for name, param in theirs.model.named_parameters()}
    rules, options = lingrad.hf.from_galore_args(args, as_published=True)
    ours = make(tmp_path, rules, cls=Trainer, args=given, **options)
    ours.train()
    assert gap(weights(ours), expected) < 1e-5  # float32 over 8 steps; 8e-7 measured
    rules, options = lingrad.hf.from_galore_args(args)
    better = make(tmp_path, rules, cls=Trainer, args=given, **options)
    better.train()
    assert gap(weights(better), expected) > 1e-3  # decay and betas honoured


class TestRefusals:
    @pytest.mark.parametrize(("options", "message"), [
        ({"optim": "adamw_torch"}, "optim='adamw_torch' is none of galore_adamw, galore_adamw_8bit, galore_adafactor, or"),
        ({"optim": "apollo_adamw"}, "APOLLO's update is not a linear map"),
        ({"optim_args": "rank=4, gap=3"}, "optim_args has 'gap', which is not an option of GaLore"),
        ({"optim_args": "rnak=4"}, "optim_args has 'rnak', which is not an option of GaLore; did you mean 'rank'?"),
        ({"optim_args": "rank"}, "optim_args is written 'rank=64, scale=0.1', not 'rank'"),
        ({"optim_args": "rank=4, rank=8"}, "optim_args has 'rank' twice"),
        ({"optim_args": "rank=4.5"}, "optim_args has rank=4.5; expected a whole number"),
        ({"optim_args": "scale=big"}, "optim_args has scale=big; expected a number"),
        ({"optim_args": "rank=0"}, "rank"),
        ({"optim_args": "proj_type=standard"}, "proj_type must be one of std, reverse_std, right, left, full, not 'standard'"),
        ({"optim_target_modules": None}, "optim_target_modules must be a regular expression"),
        ({"optim_target_modules": []}, "optim_target_modules must be a regular expression"),
        ({"optim_target_modules": "mlp("}, "'mlp(', which is not a regular expression"),
    ], ids=str)  # fmt: skip
    def test_what_is_unknown(self, tmp_path, options, message):
        with pytest.raises(SpecError) as caught:
            lingrad.hf.from_galore_args(galore(tmp_path, **options))
        assert message in str(caught.value)

    @pytest.mark.parametrize("args", [None, {"optim": "galore_adamw"}, "galore_adamw"])
    def test_what_is_no_arguments(self, args):
        with pytest.raises(SpecError, match="^args must be the TrainingArguments of the Trainer, not ") as caught:
            lingrad.hf.from_galore_args(args)
        assert caught.value.option == "args"

    def test_the_last_digit_of_what_is_not_reproduced(self, tmp_path):
        with pytest.raises(SpecError, match="as_published=True is for galore_adamw"):
            lingrad.hf.from_galore_args(galore(tmp_path, optim="galore_adamw_8bit"), as_published=True)

    def test_accumulation_as_the_trainer_does(self, tmp_path):
        args = galore(tmp_path, optim="galore_adamw_layerwise", gradient_accumulation_steps=2)
        rules, options = lingrad.hf.from_galore_args(args)
        with pytest.raises(lingrad.errors.ModeError, match="cannot go with gradient_accumulation_steps"):
            quietly(lingrad.hf.trainer_kwargs, rules, args, **options)

    def test_both_sides(self, tmp_path):
        rules, _ = lingrad.hf.from_galore_args(galore(tmp_path, optim_args="proj_type=full"))
        assert "side=both" in rules.spec

    def test_a_model_without_linear_layers(self, tmp_path):
        rules, _ = lingrad.hf.from_galore_args(galore(tmp_path))
        with pytest.raises(SpecError, match="of Embedding, which has none"):
            rules(nn.Embedding(3, 4))
