"""A run of the Trainer that is stopped, or killed, goes on to the same bits."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lingrad.hf
from lingrad.errors import CheckpointError
from tests.support.models import llama
from tests.support.peft_models import mixtral
from tests.support.runs import MODES
from tests.support.trainers import SPECS, assert_equal, examples, logs, make, weights

ROOT = Path(__file__).parents[2]
# of spec every=3, counted in finished steps: before anything is merged, where a refresh comes next, just after it, later
STOPS = (1, 3, 4, 7)
CASES = [
    *(pytest.param(spec, torch.float32, id=name) for name, spec in SPECS.items()),
    pytest.param(SPECS["svd"], torch.bfloat16, id="svd-bfloat16"),
    *(
        pytest.param(SPECS[name], torch.bfloat16, id=f"{name}-bfloat16", marks=pytest.mark.slow)
        for name in ("power", "random", "pca")
    ),
]
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SAVING = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "weight_decay": 0.1}


def resumed(folder, at, **options):
    trainer = make(folder, args={**SAVING, "output_dir": str(folder / "again")}, **options)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    return trainer


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_bit_for_bit(tmp_path, mode, spec, dtype):
    """Shuffled data, accumulation, decay, a schedule; weights, state and logs."""
    straight = make(tmp_path, spec, llama(dtype), args=SAVING, mode=mode)
    straight.train()
    for at in STOPS if dtype == torch.float32 else STOPS[::2]:
        again = resumed(tmp_path, at, spec=spec, model=llama(dtype), mode=mode)
        assert_equal(weights(again), weights(straight))
        assert_equal(again.optimizer.state_dict(), straight.optimizer.state_dict())
        assert logs(again)[:-1] == logs(straight)[:-1]  # the last one sums up what this process trained
        assert_equal(again.model.state_dict(), straight.model.state_dict())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", [
    {"base": "adamw8bit", "min_8bit_size": 16}, {"base": "muon"}, {"moments": "8bit", "min_8bit_size": 16},
    {"share": "input", "spec": "svd(rank=4, every=3, side=right)"},
    {"stagger": True}, {"carry": "rotate"}, {"ledger": False}, {"merge_every": 2}, {"layerwise": True},
    {"offload": "moments, bases, ledger"},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_with_other_options(tmp_path, options):
    options = {"spec": "svd(rank=4, every=3)", "mode": "adapter", **options}
    args = {**SAVING, **({"gradient_accumulation_steps": 1, "max_grad_norm": 0} if "layerwise" in options else {})}
    straight = make(tmp_path, args=args, **options)
    straight.train()
    again = make(tmp_path, args=args, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(weights(again), weights(straight))
    assert_equal(again.optimizer.state_dict(), straight.optimizer.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_a_plain_model(tmp_path, mode):
    from transformers import AutoModelForCausalLM

    trainer = make(tmp_path, args=SAVING, mode=mode)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    for name, weight in weights(trainer).items():
        assert torch.equal(loaded.get_parameter(name), weight), name
    assert not (tmp_path / "checkpoint-8/adapter").exists()


class TestOtherNames:
    """Mixtral's experts are fused in the model and saved one by one; the Trainer loads by the names in the file."""

    def make(self, folder, mode, **args):
        trainer = {"eval_dataset": examples(6, seed=2)}
        args = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2} | args
        return make(folder, "svd(rank=4, every=3)", mixtral().float(), args=args, mode=mode, trainer=trainer)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_run_goes_on(self, tmp_path, mode):
        straight = self.make(tmp_path, mode, max_steps=6)
        straight.train()
        assert "model.layers.0.mlp.experts.gate_up_proj" not in load_file(tmp_path / "checkpoint-4/model.safetensors")
        again = self.make(tmp_path / "again", mode, max_steps=6)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_equal(again.model.state_dict(), straight.model.state_dict())

    @pytest.mark.parametrize("mode", MODES)
    def test_the_best_model_is_loaded(self, tmp_path, mode):
        """A learning rate that ruins the model: the last evaluation is not the best one."""
        ruinous = {"learning_rate": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 6, "load_best_model_at_end": True}
        trainer = self.make(tmp_path, mode, **ruinous)
        trainer.train()
        assert trainer.state.best_global_step < 8
        found = trainer.evaluate()["eval_loss"]
        assert found == pytest.approx(trainer.state.best_metric, rel=1e-5)  # float32, W + S z rounded into W
        assert found != pytest.approx(trainer.state.log_history[-3]["eval_loss"], rel=1e-2)

    def test_a_weight_that_is_not_there(self, tmp_path):
        self.make(tmp_path, "optimizer", max_steps=2).train()
        path = tmp_path / "checkpoint-2/model.safetensors"
        state = load_file(path)
        del state["lm_head.weight"]
        save_file(state, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"checkpoint-2' has no 'lm_head\.weight'"):
            self.make(tmp_path, "optimizer").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    make(tmp_path, args=SAVING).train()
    for options, message in (
        ({"mode": "adapter"}, "the checkpoint has mode 'optimizer', this run has 'adapter'"),
        ({"spec": "svd(rank=2, every=3)"}, "config string"),
        ({"base": "sgd"}, "the checkpoint has base 'adamw', this run has 'sgd'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resumed(tmp_path, 4, **options)


class TestFolders:
    @pytest.fixture
    def run(self, tmp_path):
        trainer = make(tmp_path, args={**SAVING, "max_steps": 3}, mode="adapter")
        trainer.train()
        return tmp_path

    def test_the_last_of_all_complete_ones(self, run):
        assert lingrad.hf.last_checkpoint(run) == str(run / "checkpoint-3")
        (run / "checkpoint-10").mkdir()  # nothing in it yet
        shutil.copytree(run / "checkpoint-3", run / "checkpoint-20.old")  # of another name
        last = f"'{run / 'checkpoint-3'}' is the last complete one"
        with pytest.warns(UserWarning, match=re.escape(f"'{run / 'checkpoint-10'}': there is no model.safetensors); {last}")):
            assert lingrad.hf.last_checkpoint(run) == str(run / "checkpoint-3")
        shutil.copytree(run / "checkpoint-3", run / "checkpoint-11")
        assert lingrad.hf.last_checkpoint(str(run)) == str(run / "checkpoint-11")
        assert lingrad.hf.last_checkpoint(run / "nowhere") is None

    @pytest.mark.thinned(4)
    @pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
    @pytest.mark.parametrize("name", FILES)
    def test_whatever_is_cut_short(self, run, name, damage):
        path = run / "checkpoint-3" / name
        if damage == "gone":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if damage == "cut" else 0)
        expected = f"there is no {name}" if damage == "gone" else f"{name} is truncated or damaged"
        with pytest.raises(CheckpointError, match=expected) as caught:
            lingrad.hf.check_checkpoint(run / "checkpoint-3")
        assert str(caught.value).endswith(f"the last complete one is '{run / 'checkpoint-2'}'")
        with pytest.warns(UserWarning, match=expected):
            assert lingrad.hf.last_checkpoint(run) == str(run / "checkpoint-2")
        again = make(run, args={**SAVING, "max_steps": 3}, mode="adapter")
        with pytest.raises(CheckpointError, match=expected):
            again.train(resume_from_checkpoint=str(run / "checkpoint-3"))
        assert again.optimizer is None  # nothing was touched

    def test_true_means_the_last_complete_one(self, run):
        straight = torch.load(run / "checkpoint-3/optimizer.pt", weights_only=True)
        os.truncate(run / "checkpoint-3/optimizer.pt", 100)
        again = make(run, args={**SAVING, "max_steps": 3}, mode="adapter")
        with pytest.warns(UserWarning, match=r"optimizer.pt is truncated"):
            again.train(resume_from_checkpoint=True)
        assert_equal(again.optimizer.state_dict(), straight)
        lingrad.hf.check_checkpoint(run / "checkpoint-3")  # written again

    def test_true_where_there_is_none(self, tmp_path):
        tmp_path.joinpath("empty").mkdir()
        trainer = make(tmp_path / "empty", args=SAVING)
        with pytest.raises(ValueError, match="No valid checkpoint found"):
            trainer.train(resume_from_checkpoint=True)

    def test_true_where_none_is_complete(self, run):
        for folder in run.glob("checkpoint-*"):
            (folder / "optimizer.pt").unlink()  # without which the Trainer would go on, from new moments
        again = make(run, args={**SAVING, "max_steps": 3}, mode="adapter")
        with (
            pytest.warns(UserWarning, match="no complete one is left, and a run would start anew"),
            pytest.raises(CheckpointError, match=r"checkpoint-3' cannot be resumed from: there is no optimizer.pt"),
        ):
            again.train(resume_from_checkpoint=True)
        assert again.optimizer is None

    def test_shards(self, run):
        trainer = make(run, args={**SAVING, "max_steps": 3}, mode="adapter")
        folder = run / "checkpoint-3"
        expected = trainer.model.state_dict().keys()
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20kB")
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == expected
        assert len(set(index.values())) > 1
        lingrad.hf.check_checkpoint(folder)
        (folder / sorted(set(index.values()))[1]).unlink()
        with pytest.raises(CheckpointError, match="there is no model-00002"):
            lingrad.hf.check_checkpoint(folder)


def script(folder, mode, spec, *options):
    command = [sys.executable, "-m", "tests.support.trainer_script", str(folder), mode, spec, *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "spec", "kill"), [
    pytest.param("adapter", "svd(rank=4, every=2)", "--kill-in-save", marks=pytest.mark.exhaustive),
    ("optimizer", "power(rank=4, every=2)", "--kill-in-save"),
    ("adapter", "random(rank=4, every=2)", "--kill-at"),
    ("optimizer", "svd(rank=4, every=2)", "--kill-at"),
])  # fmt: skip
def test_kill_9(tmp_path, mode, spec, kill):
    """Killed in the middle of writing its second checkpoint, or between two; then started again."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    processes = script(straight, mode, spec), script(killed, mode, spec, kill, "6" if "save" in kill else "5")
    finished(processes[0])
    finished(processes[1], -signal.SIGKILL)
    assert not (killed / "final-0").exists()
    assert (killed / "checkpoint-6").exists() == ("save" in kill)
    assert lingrad.hf.last_checkpoint(killed) == str(killed / "checkpoint-3")
    finished(script(killed, mode, spec))
    for name in ("final-0/model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-9/model.safetensors"):
        a, b = (hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (straight, killed))
        assert a == b, name
    for name in ("end-0.pt", "checkpoint-9/optimizer.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (straight, killed))
        assert_equal(a, b)
