"""The Trainer and accelerate with FSDP2: two processes that each hold half of every weight are one process.

accelerate shards on GPUs only. Here it is told that the processes have some (`on_cpus`); all else is its own.
Tolerance: 1e-12 in float64, as for the modes: sums over processes are taken in another order.
"""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import lingrad
import lingrad.hf
from lingrad.errors import LingradError, ModeError
from lingrad.hf.folders import missing_from
from tests.support.models import gap, llama, text_batches, text_loss
from tests.support.processes import each_rank
from tests.support.runs import MODES, each_mode
from tests.support.trainers import arguments, examples, quietly

SPEC = "power(rank=4, every=3)"
TOLERANCE = 1e-12
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def on_cpus():
    """Have accelerate take this process for one with a GPU, which it asks for before it shards."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def launched(rank, world):
    """What a launcher sets."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in ranks.items()})


def make(folder, mode, kind="FULL_STATE_DICT", world=1, cls=None, emulated=True, fsdp=None, **options):
    """A Trainer: micro-batches, a clip, decay, evaluations and checkpoints."""
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4 // world,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "adam_epsilon": 1e-4,  # else rounding is divided by rounding where a gradient is nearly zero
        **options,
    }
    if world > 1:
        options |= {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"state_dict_type": kind, **LAYERS, **(fsdp or {})}}
    args = quietly(arguments, folder, **options)
    if world > 1 and emulated:
        on_cpus()
    return (cls or lingrad.hf.LingradTrainer)(
        llama(),
        args,
        train_dataset=examples(80),
        eval_dataset=examples(8),
        **lingrad.hf.trainer_kwargs(SPEC, args, mode=mode),
    )


def whole(weights):
    return {name: getattr(weight, "full_tensor", lambda w=weight: w)().detach().clone() for name, weight in weights.items()}


def ended(trainer):
    """The weights, and what was logged."""
    logged = [
        {k: v for k, v in entry.items() if k in ("loss", "eval_loss", "grad_norm")} for entry in trainer.state.log_history
    ]
    return whole(lingrad.hf.optimizer_of(trainer).weights()), logged


def straight(folder, mode, kind, world, **options):
    trainer = make(folder, mode, kind, world, **options)
    quietly(trainer.train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with decay there is no adapter
        trainer.save_model(f"{folder}/final")
    return trainer


def train(rank, world, folder, cases):
    launched(rank, world)
    found = []
    for i, (mode, kind, fsdp) in enumerate(cases):
        found.append(ended(straight(f"{folder}/{i}", mode, kind, world, fsdp=fsdp)))
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(f"{folder}/{i}/checkpoint-8")
            (Path(folder) / f"{i}/checkpoint-6/scheduler.pt").unlink()  # so that the last complete one is checkpoint-3
        torch.distributed.barrier()
        resumed = make(f"{folder}/{i}", mode, kind, world, fsdp=fsdp)
        quietly(resumed.train, resume_from_checkpoint=True)
        found.append(ended(resumed))
    return found


def assert_one(folder, cases):
    first, second = each_rank(train, 2, folder, str(folder), cases)
    for i, (mode, kind, fsdp) in enumerate(cases):
        (weights, logged), resumed = first[2 * i : 2 * i + 2]
        assert all(torch.equal(weight, second[2 * i][0][name]) for name, weight in weights.items())
        expected, expected_logs = ended(straight(f"{folder}/one-{i}", mode, kind, 1))
        assert gap(weights, expected) <= TOLERANCE, (mode, kind, fsdp)
        assert len(logged) == len(expected_logs)
        for one, other in zip(logged, expected_logs, strict=True):
            assert one.keys() == other.keys()
            assert one.get("grad_norm", 0.0) == pytest.approx(other.get("grad_norm", 0.0), rel=TOLERANCE)
            for key in ("loss", "eval_loss"):  # the Trainer rounds them to float32
                assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-6)
        assert all(torch.equal(weight, resumed[0][name]) for name, weight in weights.items()), (mode, kind, fsdp)
        assert resumed[1] == logged
        saved = type(llama()).from_pretrained(folder / f"{i}/final").double().state_dict()
        assert gap({name: saved[name] for name in weights}, weights) <= TOLERANCE


PLAIN = [(mode, kind, None) for mode in MODES for kind in KINDS]
OPTIONS = [
    (mode, kind, options)
    for mode, kind, options in (
        ("optimizer", KINDS[0], {"activation_checkpointing": True}),
        ("adapter", KINDS[1], {"activation_checkpointing": True}),
        ("optimizer", KINDS[1], {"cpu_ram_efficient_loading": True}),
        ("adapter", KINDS[0], {"cpu_ram_efficient_loading": True}),
        ("adapter", KINDS[1], {"reshard_after_forward": False}),
        ("optimizer", KINDS[0], {"auto_wrap_policy": "NO_WRAP"}),
    )
]


def test_two_processes_of_a_trainer_are_one(tmp_path):
    """Also when they resume, to the bit, and as what they have saved is read."""
    assert_one(tmp_path, PLAIN[1:3])


@pytest.mark.slow
def test_two_processes_of_a_trainer_are_one_in_other_combinations(tmp_path):
    assert_one(tmp_path, [PLAIN[0], PLAIN[3], *OPTIONS])


def reuse(rank, world, folder):
    if world > 1:
        launched(rank, world)
    found = []
    for mode in MODES:
        trainer = make(folder, mode, world=world, save_strategy="no", max_steps=4)
        quietly(trainer.train)
        lingrad.hf.finish(trainer)
        quietly(trainer.train)  # a new run
        quietly(trainer.train)  # on the same optimizer
        found.append(ended(trainer)[0])
    return found


@pytest.mark.slow
def test_a_trainer_trains_again(tmp_path):
    for one, expected in zip(each_rank(reuse, 2, tmp_path, str(tmp_path))[0], reuse(0, 1, str(tmp_path)), strict=True):
        assert gap(one, expected) <= TOLERANCE


def best(rank, world, folder, kinds):
    if world > 1:
        launched(rank, world)
    found = []
    for kind in kinds:
        options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the worst
        trainer = make(f"{folder}/{kind}", "adapter", kind, world, **options)
        quietly(trainer.train)
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
        assert trainer.state.global_step == 8
        found.append(ended(trainer)[0])
    return found


@pytest.mark.slow
def test_the_best_model_is_loaded_with_its_coordinates(tmp_path):
    found = each_rank(best, 2, tmp_path, str(tmp_path / "two"), KINDS)[0]
    expected = best(0, 1, str(tmp_path / "one"), KINDS[:1])[0]
    for weights in found:
        assert gap(weights, expected) <= TOLERANCE


def adapters(rank, world, folder):
    launched(rank, world)
    found = []
    for kind in KINDS:
        found.append(ended(straight(f"{folder}/{kind}", "adapter", kind, world, weight_decay=0.0))[0])
    return found


@pytest.mark.slow
def test_an_adapter_is_written_next_to_the_saved_model(tmp_path):
    from peft import PeftModel

    for kind, weights in zip(KINDS, each_rank(adapters, 2, tmp_path, str(tmp_path))[0], strict=True):
        merged = PeftModel.from_pretrained(llama(), tmp_path / kind / "final/adapter").merge_and_unload().state_dict()
        trained = {name: merged[name] for name in weights if "proj" in name}
        # PEFT adds the factors to the start, where the run adds each merge: 1e-14 of a weight
        assert gap(trained, {name: weights[name] for name in trained}) <= TOLERANCE


@each_mode
@pytest.mark.slow
def test_bfloat16(tmp_path, mode):
    """The Trainer's bf16: float32 weights, gathered in bfloat16. A forward rounds to 2^-8, and Adam divides by gradients."""
    weights = each_rank(halved, 2, tmp_path, str(tmp_path), mode)[0]
    expected = ended(straight(str(tmp_path / "one"), mode, KINDS[0], 1))[0]
    assert 1e-6 < gap(weights, expected) < 0.1


def halved(rank, world, folder, mode):
    launched(rank, world)
    return ended(straight(folder, mode, KINDS[0], world, bf16=True))[0]


def accelerated(rank, world, folder, cases):
    """accelerate without the Trainer: micro-batches, a clip, a schedule; a state that is loaded again."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    found = []
    for mode, kind in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = None
        if world > 1:
            launched(rank, world)
            PartialState(cpu=True)
            on_cpus()
            layers = {"transformer_cls_names_to_wrap": ["LlamaDecoderLayer"], "auto_wrap_policy": "transformer_based_wrap"}
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, **layers)
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
        model, optimizer = lingrad.hf.prepare(
            accelerator, llama(), lambda model, mode=mode: MODES[mode](model, SPEC, lr=1e-2, weight_decay=0.1, eps=1e-4)
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
        accelerator.register_for_checkpointing(schedule)
        batches = [batch for step in text_batches(8, micro=2, rows=8) for batch in step]

        def go_on(batches, accelerator=accelerator, model=model, optimizer=optimizer, schedule=schedule):
            for batch in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(text_loss(model, batch.chunk(world)[rank]))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        schedule.step()
            return whole(optimizer.optimizer.weights())

        go_on(batches[:8])
        accelerator.save_state(f"{folder}/{mode}-{kind}")
        found.append(go_on(batches[8:]))
        accelerator.load_state(f"{folder}/{mode}-{kind}")
        found.append(go_on(batches[8:]))
    return found


def assert_accelerated(folder, cases):
    found = each_rank(accelerated, 2, folder, str(folder), cases)[0]
    for i, (mode, kind) in enumerate(cases):
        expected = accelerated(0, 1, str(folder / "one"), [(mode, kind)])[0]
        assert gap(found[2 * i], expected) <= TOLERANCE
        assert all(torch.equal(weight, found[2 * i + 1][name]) for name, weight in found[2 * i].items())


@pytest.mark.slow
def test_accelerate(tmp_path):
    assert_accelerated(tmp_path, [("adapter", KINDS[0])])


@pytest.mark.slow
def test_accelerate_in_other_combinations(tmp_path):
    assert_accelerated(tmp_path, [("optimizer", kind) for kind in KINDS] + [("adapter", KINDS[1])])


def refused(rank, world, folder):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from transformers import Trainer

    launched(rank, world)
    said = []

    def attempt(function):
        try:
            function()
        except LingradError as error:
            said.append(str(error))
        else:
            said.append("nothing was raised")

    attempt(lambda: make(folder, "optimizer", world=world, cls=Trainer).train())
    attempt(lambda: make(folder, "optimizer", world=world, emulated=False).train())
    del os.environ["ACCELERATE_USE_FSDP"]  # the first Trainer has set it

    def sharded_before():
        args = quietly(arguments, folder, ddp_backend="gloo")
        lingrad.hf.LingradTrainer(
            fully_shard(llama()), args, train_dataset=examples(), **lingrad.hf.trainer_kwargs(SPEC, args)
        ).create_optimizer()

    attempt(sharded_before)

    def wrapped_before(mode):
        quietly(arguments, folder, ddp_backend="gloo")
        on_cpus()
        accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
        model = llama()
        model, optimizer = accelerator.prepare(model, MODES[mode](model, SPEC, lr=1e-2))
        accelerator.backward(text_loss(model, text_batches(1, rows=6)[0][0]))
        optimizer.step()

    for mode in MODES:
        attempt(lambda mode=mode: wrapped_before(mode))

    def export():
        model = fully_shard(llama())
        lingrad.peft.export(lingrad.adapt(model, SPEC, lr=1e-2), f"{folder}/adapter")

    attempt(export)
    return said


@pytest.mark.slow
def test_what_does_not_work_is_refused(tmp_path):
    plain, unsharded, sharded, *late, exported = each_rank(refused, 2, tmp_path, str(tmp_path))[0]
    assert plain == (
        "with fsdp the optimizer must be made after the model is sharded, and this Trainer makes it before; use "
        "lingrad.hf.LingradTrainer, LingradSFTTrainer, or lingrad.hf.TrainerMixin before your trainer's class"
    )
    assert unsharded == (
        "fsdp was asked for, and accelerate does not shard here (DistributedType.MULTI_CPU: it shards on GPUs only); leave "
        "fsdp out, and the processes train with DistributedDataParallel"
    )
    assert sharded == (
        "this model was sharded before the Trainer got it (fully_shard, from_pretrained with distributed_config or tp_plan), "
        "whose checkpoints would hold the optimizer's state of one process only; pass it unsharded, with "
        "TrainingArguments(fsdp=True)"
    )
    assert len(late) == 2
    for message in late:
        assert "was sharded after lingrad was called" in message
        assert "shard the model first, then call lingrad on it (with accelerate: lingrad.hf.prepare)" in message
    assert exported == (
        "the model is sharded, and no process has all of it; have every process gather opt.changes() and a full state dict, "
        "and one of them pass the pair (model, changes), with the plain model that has that state"
    )


class TestArguments:
    FSDP1 = (
        "the first FullyShardedDataParallel makes flat vectors of weights, in which there are no subspaces; use FSDP2: "
        "fsdp_version: 2 in accelerate's config, fsdp_config={'version': 2} of TrainingArguments"
    )

    def message(self, args):
        with pytest.raises(ModeError) as caught:
            lingrad.hf.trainer_kwargs(SPEC, args)
        return str(caught.value)

    def test_the_first_fsdp(self, tmp_path, monkeypatch):
        args = quietly(arguments, tmp_path, fsdp=True, fsdp_config={"version": 1})
        assert self.message(args) == self.FSDP1
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        assert self.message(quietly(arguments, tmp_path)) == self.FSDP1
        monkeypatch.setenv("FSDP_VERSION", "2")
        lingrad.hf.trainer_kwargs(SPEC, quietly(arguments, tmp_path))

    def test_xla(self, tmp_path):
        args = quietly(arguments, tmp_path, fsdp=True, fsdp_config={"xla": True})
        assert self.message(args) == "lingrad cannot train with FSDP on XLA devices; leave fsdp_config={'xla': ...} out"

    def test_the_second_is_taken(self, tmp_path):
        lingrad.hf.trainer_kwargs(SPEC, quietly(arguments, tmp_path, fsdp=True))

    def test_an_accelerator_is_needed(self):
        with pytest.raises(LingradError, match=r"accelerator must be an accelerate.Accelerator, not a str"):
            lingrad.hf.prepare("cuda", llama(), lambda model: lingrad.wrap(model, SPEC, lr=1e-2))


class TestFolders:
    """Which checkpoints of shards are complete; an index names the files and their lengths."""

    @pytest.fixture
    def folder(self, tmp_path):
        from torch.distributed import checkpoint

        folder = tmp_path / "checkpoint-3"
        folder.mkdir()
        for name in ("scheduler.pt", "rng_state_0.pth"):
            torch.save({}, folder / name)
        (folder / "trainer_state.json").write_text('{"global_step": 3}')
        for name in ("pytorch_model_fsdp_0", "optimizer_0"):
            checkpoint.save({"tensor": torch.ones(40)}, checkpoint_id=folder / name, no_dist=True)
        return folder

    def test_a_complete_one(self, folder):
        assert missing_from(folder) == ""

    @pytest.mark.parametrize("part", ["pytorch_model_fsdp_0", "optimizer_0"])
    def test_no_index(self, folder, part):
        (folder / part / ".metadata").unlink()
        assert missing_from(folder) == f"there is no {part}/.metadata"

    def test_a_truncated_file(self, folder):
        path = next((folder / "optimizer_0").glob("*.distcp"))
        size = path.stat().st_size
        os.truncate(path, size - 5)
        assert missing_from(folder) == (
            f"optimizer_0/.metadata is truncated or damaged ({path.name} has {size - 5} of {size} bytes)"
        )

    def test_a_truncated_index(self, folder):
        os.truncate(folder / "optimizer_0/.metadata", 20)
        assert missing_from(folder).startswith("optimizer_0/.metadata is truncated or damaged (")

    def test_full_states(self, folder):
        for name in ("pytorch_model_fsdp_0", "optimizer_0"):
            shutil.rmtree(folder / name)
        torch.save({}, folder / "pytorch_model_fsdp.bin")
        assert missing_from(folder) == "there is no optimizer.bin"
        torch.save({}, folder / "optimizer.bin")
        assert missing_from(folder) == ""
