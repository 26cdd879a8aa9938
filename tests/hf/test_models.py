"""What the Trainer leaves in a model and saves of it, with the mixin and without."""

import re

import pytest
import torch
from safetensors.torch import load_file

import lingrad
import lingrad.hf
from lingrad.errors import ModeError
from tests.support.models import gap, llama
from tests.support.runs import MODES
from tests.support.trainers import arguments, assert_equal, examples, make, weights

SPEC = "svd(rank=4, every=3)"


class TestStockTrainer:
    @pytest.mark.parametrize("mode", MODES)
    def test_without_the_mixin_it_trains_and_resumes(self, tmp_path, mode):
        from transformers import Trainer

        args = {"save_strategy": "steps", "save_steps": 5, "max_grad_norm": 0}
        trainer = make(tmp_path, cls=Trainer, mode=mode, args=args)
        trainer.train()
        again = make(tmp_path, cls=Trainer, mode=mode, args=args)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert_equal(weights(again), weights(trainer))
        mixed = make(tmp_path, mode=mode, args=args)
        mixed.train()
        assert_equal(weights(mixed), weights(trainer))

    @pytest.mark.parametrize("mode", MODES)
    def test_an_optimizer_that_was_made_before(self, tmp_path, mode):
        """``optimizers=``: the schedule and resumption work on it, and the mixin's metrics."""
        args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_grad_norm=0.5)

        def build():
            model = llama(torch.float32)
            kind = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[mode]
            opt = kind(model, SPEC, lr=args.learning_rate, seed=args.seed, self_contained=mode == "adapter")
            return lingrad.hf.LingradTrainer(model, args, train_dataset=examples(), optimizers=(opt, None))

        trainer = build()
        trainer.train()
        expected = make(tmp_path, mode=mode, args={"max_grad_norm": 0.5})
        expected.train()
        assert_equal(weights(trainer), weights(expected))
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates == [entry["learning_rate"] for entry in expected.state.log_history if "loss" in entry]
        assert "lingrad/refreshes" in trainer.state.log_history[0]
        again = build()
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_equal(weights(again), weights(trainer))
        assert_equal(again.optimizer.state_dict(), trainer.optimizer.state_dict())


class TestModels:
    """What is left in the model, and what is saved."""

    @pytest.mark.parametrize("mode", MODES)
    def test_save_pretrained_gives_a_plain_model(self, tmp_path, mode):
        from transformers import AutoModelForCausalLM

        trainer = make(tmp_path / "run", mode=mode)
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert loaded.state_dict().keys() == llama().state_dict().keys()
        for name, weight in weights(trainer).items():
            assert torch.equal(loaded.get_parameter(name), weight), name

    @pytest.mark.parametrize("mode", MODES)
    def test_finish_leaves_the_model_as_it_was_found(self, tmp_path, mode):
        trainer = make(tmp_path, mode=mode, trainer={"eval_dataset": examples(4)})
        trainer.train()
        expected, before = weights(trainer), trainer.evaluate()["eval_loss"]
        model = lingrad.hf.finish(trainer)
        assert model is trainer.model
        assert_equal(dict(model.named_parameters()), expected)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in llama().named_modules()]
        assert all(param.requires_grad for param in model.parameters())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
        with pytest.raises(ModeError, match="it has none yet: the Trainer makes it when train"):
            lingrad.hf.optimizer_of(trainer)
        trainer.train()  # anew
        assert gap(weights(trainer), expected) > 1e-3

    @pytest.mark.parametrize("mode", MODES)
    def test_evaluation_and_prediction_see_the_weights_of_the_step(self, tmp_path, mode):
        data = examples(4, seed=5)
        args = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
        trainer = make(tmp_path, mode=mode, args=args, trainer={"eval_dataset": data})
        trainer.train()
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        plain = llama(torch.float32)
        plain.load_state_dict(trainer.model.state_dict())
        ids = torch.stack([row["input_ids"] for row in data])
        with torch.no_grad():
            expected = plain(input_ids=ids, labels=ids)
        assert evaluated[-1] == pytest.approx(float(expected.loss), rel=1e-5)
        assert evaluated[0] != evaluated[-1]
        predicted = torch.from_numpy(trainer.predict(data).predictions)
        torch.testing.assert_close(predicted, expected.logits, rtol=0, atol=1e-4)
        quiet = make(tmp_path, mode=mode, args={"max_steps": 6})
        quiet.train()
        assert_equal(weights(quiet), weights(trainer))  # evaluation between steps changes nothing

    @pytest.mark.parametrize("mode", MODES)
    def test_the_best_model_is_loaded_at_the_end(self, tmp_path, mode):
        """A learning rate that ruins the model: the first evaluation is the best one."""
        args = {
            "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.5,
            "lr_scheduler_type": "linear", "warmup_steps": 6,
        }  # fmt: skip
        data = examples(6, seed=2)
        trainer = make(tmp_path, mode=mode, args=args, trainer={"eval_dataset": data})
        trainer.train()
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        best = min(evaluated)
        assert evaluated[-1] > 1.05 * best
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
        folders = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        assert folders == [f"checkpoint-{2 * (1 + evaluated.index(best))}"]
        plain = llama(torch.float32)
        plain.load_state_dict(trainer.model.state_dict())
        assert_equal(dict(plain.named_parameters()), weights(trainer))

    def test_early_stopping(self, tmp_path):
        from transformers import EarlyStoppingCallback

        args = {
            "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1.0, "warmup_steps": 0,
        }  # fmt: skip
        trainer = make(
            tmp_path, args=args, trainer={"eval_dataset": examples(4), "callbacks": [EarlyStoppingCallback(2)]}, mode="adapter"
        )
        trainer.train()
        assert trainer.state.global_step < 8


class TestAdapter:
    """``save_model`` in adapter mode: the whole model, and beside it an adapter of PEFT's that gives the same."""

    def reproduced(self, folder, trainer):
        """The start with the adapter on it, by PEFT alone, against the model that was saved."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        ids = torch.stack([row["input_ids"] for row in examples(4)])
        adapted = PeftModel.from_pretrained(llama(torch.float32), folder / "adapter")
        whole = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            found, expected, own = adapted(ids).logits, whole(ids).logits, trainer.model(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
        assert (llama(torch.float32)(ids).logits - expected).abs().max() > 0.1  # it was trained

    def test_is_written_beside_the_model(self, tmp_path):
        trainer = make(tmp_path / "run", mode="adapter", args={"save_strategy": "steps", "save_steps": 4})
        trainer.train()
        assert not list(tmp_path.glob("run/**/adapter"))
        trainer.save_model(tmp_path / "saved")
        self.reproduced(tmp_path / "saved", trainer)
        trainer.save_model(tmp_path / "saved")  # over it
        assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"adapter", "model.safetensors", "config.json"}
        assert not list((tmp_path / "saved").glob(".*"))
        trainer.save_model()
        self.reproduced(tmp_path / "run", trainer)
        expected = weights(trainer)
        again = make(tmp_path / "run", mode="adapter")
        again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
        assert_equal(weights(again), expected)
        again.save_model(tmp_path / "again")
        assert_equal(*(load_file(tmp_path / f"{name}/adapter/adapter_model.safetensors") for name in ("saved", "again")))

    def test_optimizer_mode_has_none(self, tmp_path):
        trainer = make(tmp_path / "run")
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        assert not (tmp_path / "saved/adapter").exists()

    def test_in_checkpoints_where_asked_for(self, tmp_path):
        trainer = make(tmp_path, mode="adapter", args={"save_strategy": "steps", "save_steps": 4})
        trainer.adapter_in_checkpoints = True
        trainer.train()
        self.reproduced(tmp_path / "checkpoint-8", trainer)
        again = make(tmp_path, mode="adapter")  # it is no hindrance to resumption
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_equal(weights(again), weights(trainer))

    @pytest.mark.parametrize(("args", "options", "why"), [
        ({"weight_decay": 0.1}, {}, "decay"),
        ({}, {"ledger": False}, "made with.*ledger=True|ledger=True"),
    ], ids=["decay", "no-ledger"])  # fmt: skip
    def test_where_there_can_be_none_it_says_why(self, tmp_path, args, options, why):
        trainer = make(tmp_path / "run", mode="adapter", args=args, **options)
        trainer.train()
        saved = tmp_path / "what is saved"
        (saved / "adapter").mkdir(parents=True)
        (saved / "adapter/adapter_config.json").write_text("{}")  # of an earlier save
        with pytest.warns(UserWarning, match=r"has the full model, but no adapter: .*lingrad convert START") as caught:
            trainer.save_model(saved)
        (message,) = [str(one.message) for one in caught if "adapter" in str(one.message)]
        assert re.search(why, message)
        assert f"`lingrad convert START '{saved}' --out DIR`" in message
        assert not (saved / "adapter").exists()
        assert (saved / "model.safetensors").exists()

    def test_it_takes_the_place_of_nothing_but_an_adapter(self, tmp_path):
        trainer = make(tmp_path, mode="adapter", args={"max_steps": 2})
        trainer.train()
        (tmp_path / "saved/adapter").mkdir(parents=True)
        (tmp_path / "saved/adapter/notes.txt").write_text("mine")
        with pytest.warns(UserWarning, match="no adapter: .* is not an adapter's folder, and is not overwritten"):
            trainer.save_model(tmp_path / "saved")
        assert [path.name for path in (tmp_path / "saved/adapter").iterdir()] == ["notes.txt"]
        assert not list((tmp_path / "saved").glob(".*"))

    @pytest.mark.parametrize("only_model", [False, True])
    def test_of_the_best_model(self, tmp_path, only_model):
        """A learning rate that rises until it ruins the model; the best one was merged into before, the last again since."""
        args = {
            "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_only_model": only_model,
            "learning_rate": 0.2, "warmup_steps": 4, "lr_scheduler_type": "constant_with_warmup",
        }  # fmt: skip
        few = examples(4)
        trainer = make(
            tmp_path / "run", "svd(rank=4, every=2)", mode="adapter", args=args, data=few, trainer={"eval_dataset": few}
        )
        trainer.train()
        assert 2 < trainer.state.best_global_step < 6
        if only_model:
            with pytest.warns(
                UserWarning, match=r"no adapter: the best model was loaded from .* no optimizer.pt \(save_only_model\)"
            ):
                trainer.save_model(tmp_path / "saved")
        else:
            trainer.save_model(tmp_path / "saved")
            self.reproduced(tmp_path / "saved", trainer)
