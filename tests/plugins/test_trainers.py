"""examples/plugins for axolotl, ms-swift and LLaMA-Factory, with stand-ins that have the interface of each.

The stand-ins follow axolotl 0.19.0 (integrations/base.py, core/trainers/mixins/optimizer.py), ms-swift 4.6.0
(swift/optimizers/base.py and mapping.py, swift/trainers/mixin.py) and LLaMA-Factory 0.9.5 (train/trainer_utils.py,
train/sft/trainer.py).
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import Trainer

import lingrad.hf
from lingrad.errors import SpecError
from tests.plugins.loading import load
from tests.support import trainers
from tests.support.models import llama
from tests.support.trainers import assert_equal

SETTINGS = {"rules": "svd(rank=4, every=3)", "mode": "adapter"}
STEPS = {"max_steps": 4, "max_grad_norm": 0}  # the mixin clips on a refresh step by another norm


def module(monkeypatch, name, **names):
    for count in range(1, name.count(".") + 2):
        path = ".".join(name.split(".")[:count])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    vars(sys.modules[name]).update(names)


def made(folder, cls, **options):
    """A trainer of a class that lingrad did not make, on a tiny Llama."""
    torch.manual_seed(0)
    args = trainers.arguments(folder, **STEPS)
    return cls(llama(torch.float32), args, train_dataset=trainers.examples(), **options)


def finished(trainer):
    trainer.train()
    return trainer.model.state_dict()  # W + S z: what the trainer saves


@pytest.fixture
def expected(tmp_path):
    args = trainers.arguments(tmp_path / "expected", **STEPS)
    return finished(made(tmp_path / "expected", Trainer, **lingrad.hf.trainer_kwargs(args=args, **SETTINGS)))


class AxolotlTrainer(Trainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            factory, settings = self.optimizer_cls_and_kwargs
            self.optimizer = factory()(self.model if model is None else model, self.args, **settings)
        return super().create_optimizer(model)


class Config(dict):
    """axolotl's config: a missing key is None."""

    __getattr__ = dict.get


class TestAxolotl:
    @pytest.fixture
    def plugin(self, monkeypatch):
        module(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
        module(monkeypatch, "axolotl.core.trainers.base", AxolotlTrainer=AxolotlTrainer)
        return load("axolotl_lingrad").LingradPlugin()

    def test_it_trains_as_the_trainer_does(self, tmp_path, plugin, expected):
        cfg = Config(lingrad=SETTINGS)
        trainer = made(tmp_path, plugin.get_trainer_cls(cfg))
        plugin.post_trainer_create(cfg, trainer)
        assert isinstance(trainer, lingrad.hf.TrainerMixin)
        assert_equal(finished(trainer), expected)

    def test_without_a_section_nothing_changes(self, tmp_path, plugin):
        trainer = made(tmp_path, AxolotlTrainer)
        plugin.post_trainer_create(Config(), trainer)
        assert trainer.optimizer_cls_and_kwargs is None
        assert plugin.get_trainer_cls(Config()) is None

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"adapter": "lora"}, "adapter: lora and lingrad are two ways to train the same weights; remove one of them"),
            ({"embedding_lr": 1e-4}, "embedding_lr would have no effect with lingrad"),
            ({"lingrad": {"mode": "adapter"}}, "the section lingrad needs rules, such as rules: svd(rank=128)"),
        ],
    )
    def test_refusals(self, plugin, extra, message):
        cfg = Config({"lingrad": SETTINGS, **extra})
        with pytest.raises(SpecError) as error:
            plugin.post_trainer_create(cfg, SimpleNamespace(optimizer_cls_and_kwargs=None))
        assert message in str(error.value)


class TestSwift:
    @pytest.fixture
    def plugin(self, monkeypatch):
        self.known = {}

        class OptimizerCallback:
            def __init__(self, args, trainer):
                self.args, self.trainer = args, trainer

        module(monkeypatch, "swift.optimizers", OptimizerCallback=OptimizerCallback, optimizers_map=self.known)
        loaded = load("swift_lingrad")
        monkeypatch.setattr(loaded, "SETTINGS", SETTINGS)
        return loaded

    def test_it_trains_as_the_trainer_does(self, tmp_path, plugin, expected):
        known = self.known

        class SwiftTrainer(Trainer):
            def create_optimizer(self, model=None):
                self.optimizer = known["lingrad"](self.args, self).create_optimizer(model=model)
                self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
                return self.optimizer

        assert_equal(finished(made(tmp_path, SwiftTrainer)), expected)

    def test_lora_is_refused(self, plugin):
        with pytest.raises(SpecError, match="--tuner_type lora and lingrad are two ways"):
            plugin.LingradOptimizer(SimpleNamespace(tuner_type="lora"), None).create_optimizer()


class TestLlamaFactory:
    ARGUMENTS = SimpleNamespace(finetuning_type="full")

    def test_it_trains_as_the_trainer_does(self, tmp_path, monkeypatch, expected):
        done = []
        utils = ModuleType("llamafactory.train.trainer_utils")

        class FactoryTrainer(Trainer):
            def create_optimizer(trainer, *given):
                trainer.optimizer = utils.create_custom_optimizer(trainer.model, trainer.args, self.ARGUMENTS)
                return super().create_optimizer(*given)

        def run_exp(args):
            assert args == {"finetuning_type": "full"}
            done.append(finished(made(tmp_path, FactoryTrainer)))

        given = {"finetuning_type": "full", "lingrad": dict(SETTINGS)}
        module(monkeypatch, "llamafactory.hparams.parser", read_args=lambda: given)
        module(monkeypatch, "llamafactory.train", trainer_utils=utils)
        module(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
        load("llamafactory_lingrad").main()
        assert_equal(done[0], expected)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"finetuning_type": "lora"}, "finetuning_type: lora and lingrad"),
            ({"use_muon": True}, "use_muon would have no effect"),
        ],
    )
    def test_refusals(self, changed, message):
        make = load("llamafactory_lingrad").optimizer_maker(SETTINGS)
        with pytest.raises(SpecError, match=message):
            make(None, None, SimpleNamespace(**{"finetuning_type": "full", **changed}))
