"""transformers' Trainer with lingrad's optimizer: what its arguments say is done, and what is logged."""

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

import lingrad
import lingrad.hf
from lingrad.errors import ModeError
from tests.support.models import gap, gpt2, llama
from tests.support.runs import MODES
from tests.support.trainers import SPECS, arguments, assert_equal, examples, logs, make, weights

HOOKED = "*.embed_tokens: svd(rank=4, every=3); *.mlp.*: svd(rank=4, every=3)"  # no linear layer: by hooks
SPEC = "svd(rank=4, every=3)"


def by_hand(mode, args, *, spec=SPEC, build=llama, dtype=torch.float32, autocast=False, **options):
    """The run that the arguments describe, written out: no Trainer in it."""
    from transformers import get_scheduler

    model = build(dtype)
    named = dict(model.named_parameters())
    undecayed = [name for name in named if "norm" in name or "bias" in name or ".ln_" in name]
    extra = {"self_contained": True} if mode == "adapter" else {}
    opt = (lingrad.adapt if mode == "adapter" else lingrad.wrap)(
        model,
        spec,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        seed=args.seed,
        **options,
        **extra,
    )
    for group in opt.param_groups:
        if set(group["param_names"]) & set(undecayed):
            assert set(group["param_names"]) <= set(undecayed)  # of these models no group has some of both
            group["weight_decay"] = 0.0
    schedule = get_scheduler(args.lr_scheduler_type, opt, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps)
    micro, rows = args.gradient_accumulation_steps, args.per_device_train_batch_size
    data = torch.stack([row["input_ids"] for row in examples()])
    norms = []
    for step in range(args.max_steps):
        for i in range(micro):
            start = (step * micro + i) * rows
            ids = data[start : start + rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids).loss / micro
            loss.backward()
        norms.append(float(opt.clip_grad_norm_(args.max_grad_norm)))
        opt.step()
        opt.zero_grad()
        schedule.step()
    return opt.weights(), norms


class TestArguments:
    """Each of them at a value that is not its default, beside the same run by hand."""

    options: ClassVar = {
        "train_sampling_strategy": "sequential",
        "weight_decay": 0.3,
        "adam_beta1": 0.7,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
        "max_grad_norm": 0.3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
    }

    @pytest.mark.thinned(2)
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("spec", [*SPECS.values(), HOOKED])
    def test_all_are_honoured(self, tmp_path, mode, spec):
        args = arguments(tmp_path, **self.options)
        expected, norms = by_hand(mode, args, spec=spec, scale=0.5, carry="keep")
        trainer = make(tmp_path, spec, args=self.options, mode=mode, scale=0.5)
        trainer.train()
        # losses of micro-batches are summed here and averaged there, which rounds otherwise; Adam makes more of it
        assert gap(weights(trainer), expected) < 1e-4
        found = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert found == pytest.approx(norms, rel=1e-3)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_rate_of_its_own_for_what_trains_in_full(self, tmp_path, mode):
        """``rest_lr`` beside ``learning_rate``; the Trainer's warm-up and cosine act on both alike."""
        rules = {"*embed*": "frozen", "lm_head": "none", "*norm*": "none", "*": SPEC}
        args = arguments(tmp_path, **self.options)
        expected, _ = by_hand(mode, args, spec=rules, rest_lr=1e-3)
        trainer = make(tmp_path, rules, args=self.options, mode=mode, rest_lr=1e-3)
        trainer.create_optimizer()
        assert {group["kind"]: group["lr"] for group in trainer.optimizer.param_groups} == {
            "coords": 2e-2,
            "matrices": 1e-3,
            "vectors": 1e-3,
        }
        seen = []

        def note(optimizer, *given):
            seen.append({group["kind"]: float(group["lr"]) for group in optimizer.param_groups})

        trainer.optimizer.register_step_pre_hook(note)
        trainer.train()
        assert gap(weights(trainer), expected) < 1e-4  # as above
        assert len({rates["coords"] for rates in seen}) > 4
        for rates in seen:
            assert rates["matrices"] == rates["vectors"] == pytest.approx(rates["coords"] / 20, rel=1e-12)
        embedding = trainer.model.model.embed_tokens.weight
        assert torch.equal(embedding, llama(torch.float32).model.embed_tokens.weight)
        assert not embedding.requires_grad

    @pytest.mark.parametrize("option", sorted(options.keys() - {"train_sampling_strategy"}))
    def test_every_one_matters(self, tmp_path, option):
        """So that the test above can fail."""
        args = {"train_sampling_strategy": "sequential", "weight_decay": 0.1}
        plain = make(tmp_path, args=args)
        plain.train()
        changed = make(tmp_path, args={**args, option: self.options[option]})
        changed.train()
        assert gap(weights(plain), weights(changed)) > 1e-4

    @pytest.mark.parametrize("mode", MODES)
    def test_bfloat16_autocast(self, tmp_path, mode):
        options = {"train_sampling_strategy": "sequential", "bf16": True}
        args = arguments(tmp_path, **options)
        expected, _ = by_hand(mode, args, autocast=True)
        trainer = make(tmp_path, args=options, mode=mode)
        trainer.train()
        assert all(weight.dtype == torch.float32 for weight in weights(trainer).values())
        assert gap(weights(trainer), expected) < 1e-3

    @pytest.mark.parametrize("mode", MODES)
    def test_bfloat16_weights(self, tmp_path, mode):
        options = {"train_sampling_strategy": "sequential"}
        args = arguments(tmp_path, **options)
        expected, _ = by_hand(mode, args, dtype=torch.bfloat16)
        trainer = make(tmp_path, model=llama(torch.bfloat16), args=options, mode=mode)
        trainer.train()
        assert gap(weights(trainer), expected) == 0.0  # no accumulation: the same operations

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, tmp_path, mode, reentrant):
        plain = make(tmp_path, mode=mode)
        plain.train()
        again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = make(tmp_path, args=again, mode=mode)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing
        assert_equal(weights(trainer), weights(plain))

    @pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup", "reduce_lr_on_plateau"])
    def test_schedules(self, tmp_path, schedule):
        more = {"eval_strategy": "steps", "eval_steps": 2} if "plateau" in schedule else {}
        trainer = make(
            tmp_path,
            args={"lr_scheduler_type": schedule, "learning_rate": 1e-2, "warmup_steps": 3 * (not more), **more},
            trainer={"eval_dataset": examples(4, seed=1)},
        )
        trainer.train()
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
        groups = lingrad.hf.optimizer_of(trainer).param_groups
        assert len({group["lr"] for group in groups}) == 1
        if not more:
            assert rates[:4] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])

    def test_the_seed_is_that_of_the_arguments_unless_given(self, tmp_path):
        found = [make(tmp_path, "random(rank=4, every=3)", args={"seed": seed}, **options) for seed, options in (
            (3, {}), (3, {"seed": 3}), (3, {"seed": 4})
        )]  # fmt: skip
        for trainer in found:
            trainer.train()
        assert_equal(weights(found[0]), weights(found[1]))
        assert gap(weights(found[2]), weights(found[0])) > 1e-3

    def test_what_is_given_goes_first(self, tmp_path):
        trainer = make(tmp_path, betas=(0.5, 0.6), weight_decay=0.2, lr=0.5)
        trainer.create_optimizer()
        group = lingrad.hf.optimizer_of(trainer).param_groups[0]
        assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.5, 0.6), 0.2, 0.5)

    def test_options_of_other_bases(self, tmp_path):
        trainer = make(tmp_path, base="sgd", momentum=0.5)
        trainer.train()
        assert lingrad.hf.optimizer_of(trainer).param_groups[0]["momentum"] == 0.5
        trainer = make(tmp_path, base="muon", args={"adam_beta2": 0.8})
        trainer.create_optimizer()
        by_kind = {group["kind"]: group for group in lingrad.hf.optimizer_of(trainer).param_groups}
        assert by_kind["vectors"]["betas"] == (0.9, 0.8)

    def test_both_modes_make_the_same_weights(self, tmp_path):
        found = {}
        for mode in MODES:
            model, args = llama(torch.float64), {"weight_decay": 0.1, "gradient_accumulation_steps": 2}
            trainer = make(tmp_path, model=model, mode=mode, args=args)
            trainer.train()
            found[mode] = weights(trainer)
        # in float32 the singular vectors of a refresh turn by what a processor rounds
        assert gap(found["adapter"], found["optimizer"]) < 1e-12

    def test_a_search_for_hyper_parameters_is_followed(self, tmp_path):
        """The Trainer writes a trial's learning rate into its arguments, after trainer_kwargs had seen them."""
        trainer = make(tmp_path)
        trainer.args.learning_rate = 0.25
        trainer.create_optimizer()
        assert lingrad.hf.optimizer_of(trainer).param_groups[0]["lr"] == 0.25


class TestDecay:
    def test_no_norm_and_no_bias(self, tmp_path):
        trainer = make(tmp_path, model=gpt2(torch.float32), args={"weight_decay": 0.1})
        trainer.create_optimizer()
        decays = {name for group in trainer.optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
        from transformers import Trainer

        stock = Trainer(gpt2(torch.float32), arguments(tmp_path, weight_decay=0.1))
        stock.create_optimizer()
        decayed = {id(p) for group in stock.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert decays == {name for name, param in stock.model.named_parameters() if id(param) in decayed}

    def test_a_group_of_which_some_decay_is_parted(self, tmp_path):
        """By name, as the Trainer has it: a linear layer called norm, a vector of another name, a matrix called bias."""

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.input_norm = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
                self.gain, self.relative_bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8, 8))
                self.head = nn.Linear(8, 8)

            def forward(self, x, labels=None):
                out = self.head(self.input_norm(self.first(x * self.gain) @ self.relative_bias) + x)
                return {"loss": (out - labels).square().mean(), "logits": out}

        torch.manual_seed(0)
        data = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(16)]
        args = {"weight_decay": 0.5, "save_strategy": "steps", "save_steps": 4}
        trainer = make(tmp_path, "svd(rank=2, every=3)", model=Odd(), args=args, data=data)
        start = trainer.model.first.weight.detach().clone()
        trainer.train()
        groups = {group["name"]: group for group in lingrad.hf.optimizer_of(trainer).param_groups}
        assert {name: (group["param_names"], group["weight_decay"]) for name, group in groups.items()} == {
            "coords": (["first.weight"], 0.5),
            "coords.no_decay": (["input_norm.weight"], 0.0),
            "matrices": (["head.weight"], 0.5),
            "matrices.no_decay": (["relative_bias"], 0.0),
            "vectors": (["gain"], 0.5),
            "vectors.no_decay": (["head.bias"], 0.0),
        }
        assert not torch.equal(trainer.model.first.weight, start)
        again = make(tmp_path, "svd(rank=2, every=3)", model=Odd(), args=args, data=data)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_equal(weights(again), weights(trainer))


class TestLogs:
    @pytest.mark.parametrize("mode", MODES)
    def test_what_is_added(self, tmp_path, mode):
        trainer = make(
            tmp_path, mode=mode, trainer={"eval_dataset": examples(4)}, args={"eval_strategy": "steps", "eval_steps": 4}
        )
        trainer.train()
        entries = trainer.state.log_history
        training = [entry for entry in entries if "loss" in entry]
        assert [entry["lingrad/refreshes"] for entry in training] == [1, 1, 1, 2, 2, 2, 3, 3]
        assert all(0 < entry["lingrad/captured_energy"] <= 1 for entry in training)
        for entry in training[1:]:  # the first has a learning rate of 0
            assert (entry.get("lingrad/coords_norm", 0.0) > 0) == ("lingrad/coords_norm" in entry) == (mode == "adapter")
        opt = lingrad.hf.optimizer_of(trainer)
        moments = sum(t.nbytes for entries in opt.state.values() for k, t in entries.items() if k.startswith("exp_avg"))
        others = [t.nbytes for sub in opt.subspaces for t in (*sub.basis.tensors(), *([] if sub.released else [sub.coords]))]
        steps = 4 * len(opt.state)
        assert training[-1]["lingrad/state_bytes"] == pytest.approx(moments + sum(others) + steps, abs=steps + 4)
        assert not any(key.startswith("lingrad/") for entry in entries if "loss" not in entry for key in entry)

    def test_nothing_where_lingrad_is_not(self, tmp_path):
        data, args = examples(), arguments(tmp_path)
        trainer = lingrad.hf.LingradTrainer(llama(torch.float32), args, train_dataset=data)
        trainer.train()
        assert not any("lingrad" in key for entry in trainer.state.log_history for key in entry)
        assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)
        with pytest.raises(ModeError, match="it has a AdamW; pass it"):
            lingrad.hf.optimizer_of(trainer)

    def test_energy_is_left_out_where_none_is_measured(self, tmp_path):
        trainer = make(tmp_path, "random(rank=4, every=3)")
        trainer.train()
        training = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all("lingrad/captured_energy" not in entry for entry in training)
        assert [entry["lingrad/refreshes"] for entry in training] == [1, 1, 2, 2, 2, 3, 3, 3]  # drawn before the step

    def test_no_clipping_still_logs_the_norm(self, tmp_path):
        trainer = make(tmp_path, args={"max_grad_norm": 0.0})
        trainer.train()
        assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)

    def test_the_clip_of_a_refresh_step_is_by_the_new_basis(self, tmp_path):
        """The norm that is logged is that of the gradient the step uses; accelerate's own would be of the old basis."""
        norms = {}
        for cls in (lingrad.hf.LingradTrainer, None):
            from transformers import Trainer

            trainer = make(tmp_path, cls=cls or Trainer, args={"max_grad_norm": 1e9})
            trainer.train()
            norms[cls] = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
        ours, stock = norms.values()
        same = [math.isclose(a, b, rel_tol=1e-5) for a, b in zip(ours, stock, strict=True)]
        assert same == [False, True, True, False, True, True, False, True]  # steps 0, 3, 6 refresh


def test_logs_of_two_runs_agree(tmp_path):
    """What is logged is a function of the run."""
    found = []
    for _ in range(2):
        trainer = make(tmp_path, mode="adapter")
        trainer.train()
        found.append(logs(trainer))
    assert found[0] == found[1]


class TestNamedMethods:
    def test_a_name_brings_base_and_options(self, tmp_path):
        args = arguments(tmp_path)
        found = lingrad.hf.trainer_kwargs("ldadam(rank=4)", args)["optimizer_cls_and_kwargs"]
        opt = found[0]()(llama(torch.float32), **found[1])
        by_parts = lingrad.wrap(llama(torch.float32), "power(rank=4, every=1)", carry="transport", residual="feedback")
        assert opt.settings.identity() | {"seed": 0} == by_parts.settings.identity()
        assert {group["betas"] for group in opt.param_groups} == {(0.908, 0.99)}

    def test_what_the_arguments_change_goes_first(self, tmp_path):
        args = arguments(tmp_path, adam_beta1=0.7)
        found = lingrad.hf.trainer_kwargs("ldadam(rank=4)", args, carry="rotate")["optimizer_cls_and_kwargs"]
        opt = found[0]()(llama(torch.float32), **found[1])
        assert {group["betas"] for group in opt.param_groups} == {(0.7, args.adam_beta2)}
        assert opt.settings.carry == "rotate"

    def test_another_base(self, tmp_path):
        found = lingrad.hf.trainer_kwargs("flora(rank=4)", arguments(tmp_path))["optimizer_cls_and_kwargs"]
        opt = found[0]()(llama(torch.float32), **found[1])
        assert type(opt.base) is torch.optim.SGD
        assert {group["momentum"] for group in opt.param_groups} == {0.9}
