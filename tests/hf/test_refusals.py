"""What `lingrad.hf` refuses, and what it lets through that the Trainer refuses or does by halves."""

import sys
import warnings

import pytest
import torch

import lingrad.hf
from lingrad.errors import DependencyError, ModeError, SpecError
from tests.support import trainers
from tests.support.models import gap, llama
from tests.support.runs import MODES
from tests.support.trainers import arguments, make, weights

SPEC = "svd(rank=4, every=3)"


class TestRefusals:
    def refused(self, tmp_path, error, match, args=None, **options):
        with pytest.raises(error, match=match):
            lingrad.hf.trainer_kwargs(options.pop("spec", SPEC), arguments(tmp_path, **args or {}), **options)

    def test_another_optimizer(self, tmp_path):
        self.refused(
            tmp_path,
            SpecError,
            "optim='adafactor' would have no effect: the base is 'adamw'; pass base='adafactor'",
            {"optim": "adafactor"},
        )
        self.refused(tmp_path, SpecError, "optim='lomo' would have no effect.*leave it out", {"optim": "lomo"})
        self.refused(tmp_path, SpecError, "is the Trainer's own GaLore; translate it", {"optim": "galore_adamw"})
        lingrad.hf.trainer_kwargs(SPEC, arguments(tmp_path, optim="adafactor"), base="adafactor")
        lingrad.hf.trainer_kwargs(SPEC, arguments(tmp_path, optim="adamw_torch"))

    def test_what_belongs_to_another_optimizer(self, tmp_path):
        self.refused(tmp_path, SpecError, "optim_args='x=1' would have no effect", {"optim_args": "x=1"})
        self.refused(
            tmp_path, SpecError, "optim_target_modules=.*would have no effect; rules select", {"optim_target_modules": ["q"]}
        )
        self.refused(
            tmp_path,
            SpecError,
            "adam_beta1=0.5, adam_beta2=0.999 would have no effect: the base 'sgd'",
            {"adam_beta1": 0.5},
            base="sgd",
        )
        self.refused(
            tmp_path,
            SpecError,
            "adam_epsilon=0.1 would have no effect: the base 'lion'|lion",
            {"adam_epsilon": 0.1},
            base="lion",
        )

    def test_an_optimizer_whose_models_would_lack_its_coordinates(self, tmp_path):
        model = llama(torch.float32)
        opt = lingrad.adapt(model, SPEC, lr=1e-2, self_contained=False)
        with pytest.raises(ModeError, match="would lack its coordinates; leave that option out"):
            lingrad.hf.LingradTrainer(model, arguments(tmp_path), optimizers=(opt, None))

    @pytest.mark.parametrize("by_launcher", [False, True])
    def test_deepspeed(self, tmp_path, monkeypatch, by_launcher):
        args = arguments(tmp_path)
        if by_launcher:
            monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        else:
            args.deepspeed = {"zero_optimization": {"stage": 2}}
        with pytest.raises(ModeError) as caught:
            lingrad.hf.trainer_kwargs(SPEC, args)
        assert str(caught.value) == (
            "DeepSpeed cuts weights, gradients or the optimizer's parameters into flat vectors of its own, in which there "
            "are no subspaces; leave it out, and shard by FSDP2: TrainingArguments(fsdp=True), or fsdp_version: 2 in "
            "accelerate's config"
        )

    def test_several_gpus_in_one_process(self, tmp_path):
        args = arguments(tmp_path)
        args._n_gpu = 2
        with pytest.raises(ModeError, match="2 GPUs into one DataParallel"):
            lingrad.hf.trainer_kwargs(SPEC, args)

    def test_layerwise(self, tmp_path):
        args = {"gradient_accumulation_steps": 2, "max_grad_norm": 0}
        self.refused(tmp_path, ModeError, "layerwise=True makes every backward a step", args, layerwise=True)
        with pytest.warns(UserWarning, match=r"max_grad_norm=1.0 has no effect with layerwise=True"):
            lingrad.hf.trainer_kwargs(SPEC, arguments(tmp_path), layerwise=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lingrad.hf.trainer_kwargs(SPEC, arguments(tmp_path, max_grad_norm=0), layerwise=True)

    def test_the_old_name_of_rules(self, tmp_path):
        args = arguments(tmp_path)
        with pytest.warns(
            DeprecationWarning, match="spec_or_rules of lingrad.hf.trainer_kwargs is deprecated; use rules"
        ) as caught:
            found = lingrad.hf.trainer_kwargs(spec_or_rules=SPEC, args=args)
        assert caught[0].filename == __file__
        assert found == lingrad.hf.trainer_kwargs(SPEC, args)
        with pytest.raises(SpecError, match="got spec_or_rules, which is now called rules, and rules"):
            lingrad.hf.trainer_kwargs(SPEC, args, spec_or_rules=SPEC)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'rules'"):
            lingrad.hf.trainer_kwargs(args=args)

    @pytest.mark.parametrize("ledger", ["x", 2, []])
    def test_a_ledger_of_another_type(self, tmp_path, ledger):
        self.refused(tmp_path, SpecError, "^ledger must be True, False or None, not ", ledger=ledger)

    def test_what_is_wrong_is_said_before_training(self, tmp_path):
        self.refused(tmp_path, SpecError, "unknown option 'rnak'", spec="svd(rnak=4)")
        self.refused(tmp_path, SpecError, "takes no option 'momentun'", base="sgd", momentun=0.1)
        self.refused(tmp_path, SpecError, "mode must be one of optimizer, adapter", mode="lora")
        self.refused(tmp_path, SpecError, "carry must be one of", carry="sometimes")
        self.refused(tmp_path, SpecError, "'self_contained' is set by lingrad.hf", self_contained=False)
        with pytest.raises(SpecError, match="args must be the TrainingArguments"):
            lingrad.hf.trainer_kwargs(SPEC, {"learning_rate": 1})

    def test_a_head_that_is_used_behind_its_back(self, tmp_path):
        trainer = make(tmp_path, {"lm_head": SPEC}, args={"use_liger_kernel": False})
        trainer.args.use_liger_kernel = True
        with pytest.raises(ModeError, match="lm_head.weight is transformed, but use_liger_kernel multiplies by it"):
            trainer.create_optimizer()
        trainer.args.use_liger_kernel = False
        trainer.create_optimizer()  # nothing was left behind

    def test_coordinates_that_have_no_place_in_the_model(self, tmp_path):
        """The Trainer zeroes and clips what model.parameters() names, no more."""

        class Own(torch.nn.Sequential):
            def __init__(self):
                super().__init__(torch.nn.Linear(4, 4))
                self.mix = torch.nn.Parameter(torch.eye(4))

            def forward(self, x, labels=None):
                out = super().forward(x) @ self.mix
                return {"loss": (out - labels).square().mean()}

        trainer = make(tmp_path, {"mix": "svd(rank=2)"}, model=Own())
        with pytest.raises(ModeError, match="the coordinates of mix are not among the model's parameters"):
            trainer.create_optimizer()
        make(tmp_path, {"0": "svd(rank=2)"}, model=trainer.model).create_optimizer()  # nothing was left behind

    def test_transformers_is_missing(self, tmp_path, monkeypatch):
        args = arguments(tmp_path)
        monkeypatch.setitem(sys.modules, "transformers", None)
        monkeypatch.setitem(sys.modules, "trl", None)
        with pytest.raises(DependencyError, match=r"lingrad.hf needs the package transformers: pip install 'lingrad\[hf\]'"):
            lingrad.hf.trainer_kwargs(SPEC, args)
        lingrad.hf.mixin.ready_made.cache_clear()
        with pytest.raises(DependencyError, match=r"LingradSFTTrainer needs the package trl: pip install 'lingrad\[trl\]'"):
            _ = lingrad.hf.LingradSFTTrainer
        with pytest.raises(AttributeError, match="no attribute 'LingradTariner'"):
            _ = lingrad.hf.LingradTariner


class TestLayerwise:
    @pytest.mark.parametrize("mode", MODES)
    def test_it_follows_the_schedule_and_logs_no_norm(self, tmp_path, mode):
        plain = make(tmp_path, mode=mode, args={"max_grad_norm": 0})
        plain.train()
        trainer = make(tmp_path, mode=mode, args={"max_grad_norm": 0}, layerwise=True)
        trainer.train()
        assert gap(weights(trainer), weights(plain)) < 1e-6
        assert not any("grad_norm" in entry for entry in trainer.state.log_history)

    def test_the_stock_trainer_clips_nothing_and_does_not_fail(self, tmp_path):
        from transformers import Trainer

        trainer = trainers.quietly(make, tmp_path, cls=Trainer, layerwise=True, args={"max_grad_norm": 1e-9})
        trainer.train()
        plain = make(tmp_path, args={"max_grad_norm": 0})
        plain.train()
        assert gap(weights(trainer), weights(plain)) < 1e-6


class TestQuantized:
    """The Trainer takes a quantized model only with an adapter of PEFT's; lingrad brings its own."""

    def model(self, trainable=True):
        model = llama(torch.float32)
        model.is_quantized = True
        model.hf_quantizer = type("Quantizer", (), {"is_trainable": trainable, "is_qat_trainable": False})()
        return model

    def test_the_mixin_lets_it_in(self, tmp_path):
        from transformers import Trainer

        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
            make(tmp_path, cls=Trainer, model=self.model())
        trainer = make(tmp_path, model=self.model(), mode="adapter")
        assert not trainer.model._hf_peft_config_loaded  # else save_pretrained would look for PEFT's adapter
        with lingrad.hf.quantized_allowed(model := self.model()):
            make(tmp_path, cls=Trainer, model=model)

    def test_not_where_the_quantization_cannot_train(self, tmp_path):
        with pytest.raises(ValueError, match="purely quantized"):
            make(tmp_path, model=self.model(trainable=False))
