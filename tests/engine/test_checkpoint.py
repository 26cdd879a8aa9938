"""State: saved, loaded into a fresh run, and gone on with to the same bits; or refused with the first difference."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import lingrad
from lingrad.errors import CheckpointError
from tests.support.cases import BASES, SIDED, UNSIDED
from tests.support.models import llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode, through_a_file


def assert_resumes(build, make, batches, loss, at):
    straight, optimizer = build(), None
    optimizer = make(straight)
    train(straight, optimizer, batches, loss, schedule=False)
    first = build()
    optimizer = make(first)
    train(first, optimizer, batches[:at], loss, schedule=False)
    saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = build()
    optimizer = make(resumed)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, batches[at:], loss, schedule=False)
    assert straight.state_dict().keys() == resumed.state_dict().keys()
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.thinned(8)
@pytest.mark.rare(3)
@each_mode
@pytest.mark.parametrize("at", [3, 4, 5])  # before, at and after the refresh of step 4
@pytest.mark.parametrize("spec", [s.format(side="short").replace("every=7", "every=4") for s in SIDED] + list(UNSIDED))
def test_resuming_is_exact(spec, at, mode):
    assert_resumes(llama, lambda m: MODES[mode](m, spec, lr=1e-2), text_batches(8, micro=1), text_loss, at)


@pytest.mark.thinned(3)
@each_mode
@pytest.mark.parametrize("base", [*BASES, "adam", "rmsprop", "adagrad", "adafactor", "muon", "adamw8bit"])
def test_resuming_is_exact_for_every_base(base, mode):
    options = BASES.get(base, {"lr": 1e-2})
    batches = text_batches(6, micro=1)

    def build():
        return llama(torch.float32)

    assert_resumes(build, lambda m: MODES[mode](m, "svd(rank=4, every=4)", base, **options), batches, text_loss, 3)


@each_mode
def test_resuming_every_kind_of_weight_in_low_precision(mode):
    rules = {"*": "svd(rank=1, every=3)"}
    assert_resumes(lambda: zoo(torch.bfloat16), lambda m: MODES[mode](m, rules, lr=1e-2), zoo_batches(6), zoo_loss, 4)


def test_the_state_is_flat_and_plain():
    model = llama()
    optimizer = lingrad.wrap(model, "kron(left=svd(rank=4), right=random(rank=3))", lr=1e-2)
    train(model, optimizer, text_batches(2))
    state = optimizer.state_dict()
    coords = state["state"][0]
    assert {k for k in coords if k.startswith("subspace.")} == {
        "subspace.step",
        "subspace.refreshes",
        "subspace.merged",
        "subspace.energy",
        "subspace.m",
        "subspace.n",
        "subspace.state.left.left",
        "subspace.state.right.seed",
        "subspace.state.right.m",
        "subspace.state.right.n",
        "subspace.state.right.q",
        "subspace.state.right.like",
    }
    assert coords["subspace.step"] == 2
    assert all(isinstance(value, torch.Tensor | int | float) for value in coords.values())


@pytest.mark.parametrize("steps", [0, 3])
def test_a_flattened_state_has_the_energy_whether_or_not_the_run_has_one(steps):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4, every=2)", lr=1e-2)
    train(model, optimizer, text_batches(steps, micro=1), schedule=False)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    energy = optimizer.captured_energy()
    assert bool(energy) is bool(steps)
    train(model, optimizer, text_batches(5, micro=1)[3:], schedule=False)
    fresh = llama()
    for into, run in ((model, optimizer), (fresh, lingrad.wrap(fresh, "svd(rank=4, every=2)", lr=1e-2))):
        set_optimizer_state_dict(into, run, state, options=options)
        assert run.captured_energy() == energy


def saved_after_two_steps(make):
    model = llama()
    optimizer = make(model)
    train(model, optimizer, text_batches(2))
    return optimizer.state_dict()


def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_changed():
    saved = saved_after_two_steps(lambda m: lingrad.wrap(m, "svd(rank=4)", lr=1e-2))
    runs = {
        lambda m: lingrad.wrap(m, "svd(rank=5)", lr=1e-2): (
            "group 'coords', entry 0: the checkpoint has config string 'svd(rank=4)', this run has 'svd(rank=5)'"
        ),
        lambda m: lingrad.adapt(m, "svd(rank=4)", lr=1e-2): (
            "the checkpoint has mode 'optimizer', this run has 'adapter'; call opt.switch('optimizer') before loading"
        ),
        lambda m: lingrad.wrap(m, "svd(rank=4)", "adam", lr=1e-2): (
            "the checkpoint has base 'adamw', this run has 'adam'; make the run with base='adamw'"
        ),
        lambda m: lingrad.wrap(m, "svd(rank=4)", lr=1e-2, carry="reset"): (
            "the checkpoint has carry 'keep', this run has 'reset'; make the run with carry='keep'"
        ),
        lambda m: lingrad.wrap(m, "svd(rank=4)", lr=1e-2, seed=1): (
            "the checkpoint has seed 0, this run has 1; make the run with seed=0"
        ),
        lambda m: lingrad.wrap(m, "svd(rank=4)", lr=1e-2, compat="galore"): (
            "the checkpoint has compat None, this run has 'galore'; make the run with compat=None"
        ),
        lambda m: lingrad.wrap(m, {"*.mlp.*": "svd(rank=4)"}, lr=1e-2): (
            "group 'coords': the checkpoint has 14 params, this run has 6"
        ),
        lambda m: lingrad.wrap([("x", m.lm_head.weight)], "svd(rank=4)", lr=1e-2): (
            "the checkpoint has 3 param groups and this run 1"
        ),
    }
    for make, message in runs.items():
        model = llama()
        optimizer = make(model)
        before = optimizer.state_dict()["state"]
        with pytest.raises(CheckpointError) as caught:
            optimizer.load_state_dict(saved)
        assert str(caught.value) == message
        assert optimizer.state_dict()["state"].keys() == before.keys()
        assert optimizer._run.step == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["param_groups"][0].pop("format"), "have no 'format': it was not written by lingrad's optimizer"),
        (lambda s: s["state"][0].pop("subspace.refreshes"), "the checkpoint has no 'subspace.refreshes' for model.layers.0"),
        (
            lambda s: s["state"][3].pop("subspace.state.right"),
            "the checkpoint has no 'subspace.state.right' for model.layers.0",
        ),
        (
            lambda s: s["state"][0].update({"subspace.state.right": torch.zeros(2, 2)}),
            r"'subspace.state.right' of .*q_proj.weight is float32 \(2, 2\) in the checkpoint, and float64 \(32, 4\)",
        ),
        (lambda s: s["param_groups"][0]["param_names"].__setitem__(1, "y"), "entry 1: the checkpoint has parameter 'y'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_whole(damage, message):
    saved = saved_after_two_steps(lambda m: lingrad.wrap(m, "svd(rank=4)", lr=1e-2))
    damage(saved)
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
    bases = [sub.map().tensors[0].clone() for sub in optimizer.subspaces]
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(a, sub.map().tensors[0]) for a, sub in zip(bases, optimizer.subspaces, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("wrong", [{}, {"model": 1, "optimizer": 2}, "a path", {"state": {}}])
def test_what_is_no_optimizer_s_state_is_refused(wrong):
    optimizer = lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2)
    with pytest.raises(
        CheckpointError, match=r"this is not an optimizer's state_dict: it needs 'state' and 'param_groups', and has"
    ):
        optimizer.load_state_dict(wrong)


def test_moments_of_another_shape_are_refused():
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
    train(model, optimizer, text_batches(2))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(3, 3)
    fresh = lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2)
    with pytest.raises(CheckpointError, match=r"'exp_avg' of .*q_proj.weight is .*\(3, 3\) in the checkpoint, and .*\(32, 4\)"):
        fresh.load_state_dict(saved)
    assert not fresh.state


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_codes_of_one_kind_are_not_read_by_the_book_of_another(base):
    """Bytes are bytes: only what the checkpoint says of itself tells them apart."""
    kinds = {"8bit": {"moments": "8bit"}, "8bit_linear": {"moments": "8bit_linear"}, "plain": {}}
    momentum = {"momentum": 0.9} if base == "sgd" else {}

    def run(kind):
        options = kinds[kind] | ({"min_8bit_size": 2} if kind != "plain" else {})
        model = llama(torch.float32)
        return model, lingrad.wrap(model, "svd(rank=4)", base, lr=1e-2, **options, **momentum)

    for kind in kinds:
        model, optimizer = run(kind)
        train(model, optimizer, text_batches(2))
        saved = optimizer.state_dict()
        for other in kinds:
            _, fresh = run(other)
            if other == kind:
                fresh.load_state_dict(saved)
            else:
                with pytest.raises(CheckpointError):
                    fresh.load_state_dict(saved)
                assert not fresh.state


def test_loading_shares_no_memory_with_what_was_loaded():
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
    train(model, optimizer, text_batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = llama()
    optimizer = lingrad.wrap(other, "svd(rank=4)", lr=1e-2)
    optimizer.load_state_dict(saved)
    train(other, optimizer, text_batches(2))
    for index, entries in kept["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(saved["state"][index][key], value), key


def test_loading_restores_hyper_parameters():
    saved = saved_after_two_steps(lambda m: lingrad.wrap(m, "svd(rank=4)", lr=1e-2, scale=0.5))
    optimizer = lingrad.wrap(llama(), "svd(rank=4)", lr=3.0)
    optimizer.load_state_dict(saved)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in saved["param_groups"]]
    assert optimizer.param_groups[0]["scale"] == 0.5


@each_mode
def test_torch_distributed_checkpoint_s_functions_carry_the_state_over(mode):
    """get_optimizer_state_dict steps a fresh optimizer once to make it allocate; set_ renumbers the parameters."""
    batches = text_batches(6, micro=1)

    def run():
        model = llama()
        return model, MODES[mode](model, "svd(rank=4, every=4)", lr=1e-2, weight_decay=0.1)

    straight, optimizer = run()
    train(straight, optimizer, batches, text_loss, schedule=False)
    first, optimizer = run()
    train(first, optimizer, batches[:3], text_loss, schedule=False)
    saved = through_a_file({"model": first.state_dict(), "optimizer": get_optimizer_state_dict(first, optimizer)})
    resumed, optimizer = run()
    resumed.load_state_dict(saved["model"])
    set_optimizer_state_dict(resumed, optimizer, saved["optimizer"])
    train(resumed, optimizer, batches[3:], text_loss, schedule=False)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_a_saved_model_goes_on_in_another_process(tmp_path):
    """Nothing of a run lives in the process: seeds, bases, moments and weights come from the files."""
    program = """
import sys, torch, lingrad
from tests.support.models import llama, text_batches, text_loss, train
start, end, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model = llama()
optimizer = lingrad.adapt(model, "kron(left=random(rank=4, every=2), right=svd(rank=4, every=2))", lr=1e-2)
if start:
    saved = torch.load(f"{folder}/{start}.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
train(model, optimizer, text_batches(6, micro=1)[start:end], text_loss, schedule=False)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/{end}.pt")
"""
    for start, end in ((0, 3), (3, 6)):
        subprocess.run([sys.executable, "-c", program, str(start), str(end), str(tmp_path)], check=True)
    resumed = torch.load(tmp_path / "6.pt", weights_only=True)
    subprocess.run([sys.executable, "-c", program, "0", "6", str(tmp_path)], check=True)
    straight = torch.load(tmp_path / "6.pt", weights_only=True)
    assert all(torch.equal(value, resumed["model"][name]) for name, value in straight["model"].items())
