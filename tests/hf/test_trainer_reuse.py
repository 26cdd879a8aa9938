"""A trainer that trains more than once: again, with a new model, with a smaller batch; and a class of one's own."""

import subprocess
import sys

import pytest
import torch

import lingrad.hf
from lingrad.errors import ModeError
from tests.support.models import gap, llama
from tests.support.runs import MODES
from tests.support.trainers import arguments, assert_equal, examples, make, weights

SPEC = "svd(rank=4, every=3)"


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on(tmp_path, mode):
    """A second train() keeps weights, moments and bases, and begins a schedule anew, as with any optimizer."""
    trainer = make(tmp_path, mode=mode)
    trainer.train()
    opt, before = lingrad.hf.optimizer_of(trainer), weights(trainer)
    trainer.train()
    assert lingrad.hf.optimizer_of(trainer) is opt
    assert gap(weights(trainer), before) > 1e-3
    assert {entries["subspace.step"] for entries in opt.state_dict()["state"].values() if "subspace.step" in entries} == {16}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8  # of the second


@pytest.mark.parametrize("mode", MODES)
def test_model_init_makes_a_new_model_for_each_run(tmp_path, mode):
    args = arguments(tmp_path, train_sampling_strategy="sequential")  # making a model draws from the generator that shuffles
    trainer = lingrad.hf.LingradTrainer(
        model_init=lambda: llama(torch.float32),
        args=args,
        train_dataset=examples(),
        **lingrad.hf.trainer_kwargs(SPEC, args, mode=mode),
    )
    found = []
    for _ in range(2):
        trainer.train()
        found.append(weights(trainer))
    assert_equal(found[0], found[1])
    assert_equal(found[0], run(tmp_path, mode, train_sampling_strategy="sequential"))


def run(folder, mode, **args):
    trainer = make(folder, mode=mode, args=args)
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("mode", [pytest.param("optimizer", marks=pytest.mark.slow), "adapter"])
def test_a_batch_that_does_not_fit(tmp_path, mode):
    """auto_find_batch_size: the first backward fails half-way, and leaves nothing behind."""

    class Small(lingrad.hf.LingradTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            if inputs["input_ids"].shape[0] > 2:
                lm_head = model.lm_head.weight
                loss = loss + 0 * model.model.layers[0].input_layernorm.weight.sum()
                lm_head.register_hook(lambda grad: None)
                loss.backward()
                raise RuntimeError("CUDA out of memory.")
            return loss

    options = {"per_device_train_batch_size": 4, "auto_find_batch_size": True}
    trainer = make(tmp_path, mode=mode, cls=Small, args=options)
    trainer.train()
    assert trainer._train_batch_size == 2
    assert_equal(weights(trainer), run(tmp_path, mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_class_of_ones_own(tmp_path, mode):
    """The mixin before any trainer's class, whose own get_decay_parameter_names and log are asked."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Mine(lingrad.hf.TrainerMixin, Seq2SeqTrainer):
        def get_decay_parameter_names(self, model):
            return ["lm_head.weight"]

        def log(self, logs, *args, **kwargs):
            super().log({**logs, "mine": 1.0}, *args, **kwargs)

    args = arguments(tmp_path, Seq2SeqTrainingArguments, weight_decay=0.5)
    trainer = Mine(llama(torch.float32), args, train_dataset=examples(), **lingrad.hf.trainer_kwargs(SPEC, args, mode=mode))
    trainer.train()
    decaying = [group["param_names"] for group in lingrad.hf.optimizer_of(trainer).param_groups if group["weight_decay"]]
    assert decaying == [["lm_head.weight"]]
    assert {"mine", "lingrad/refreshes"} <= trainer.state.log_history[0].keys()
    optimizer = torch.optim.SGD(llama().parameters())
    with pytest.raises(ModeError, match="got an optimizer and .*trainer_kwargs"):
        Mine(llama(), args, optimizers=(optimizer, None), **lingrad.hf.trainer_kwargs(SPEC, args, mode=mode))


def test_importing_it_imports_none_of_theirs():
    code = (
        "import sys, lingrad; lingrad.hf.last_checkpoint('nowhere'); "
        "found = {'transformers', 'trl', 'peft', 'accelerate', 'safetensors'} & sys.modules.keys(); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", MODES)
def test_the_group_of_a_parameter_is_that_of_its_coordinates(tmp_path, mode):
    """A transformed weight is in no param group itself; the Trainer's own compares values, which fails."""
    trainer = make(tmp_path, mode=mode)
    trainer.create_optimizer()
    optimizer = lingrad.hf.optimizer_of(trainer)
    found = {}
    for attachment in optimizer.attachments:
        for given in (attachment.sub.weight.param, attachment.sub.coords, attachment.sub.name):
            assert trainer.get_optimizer_group(given)["kind"] == "coords"
    for name, param in trainer.model.named_parameters():
        if not name.endswith(".coords"):
            group = trainer.get_optimizer_group(param)
            assert name in group["param_names"]
            assert trainer.get_optimizer_group(name) is group
            found.setdefault(group["name"], []).append(name)
    assert {name: sorted(names) for name, names in found.items()} == {
        group["name"]: sorted(group["param_names"]) for group in optimizer.param_groups
    }
    assert trainer.get_optimizer_group() == [group["params"] for group in optimizer.param_groups]
    for unknown in (torch.nn.Parameter(torch.zeros(3)), "unknown"):
        with pytest.raises(ModeError, match="no param group has this parameter"):
            trainer.get_optimizer_group(unknown)
