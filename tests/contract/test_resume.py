"""Resuming in combination: every transform, base, dtype, mode and moment; over switches; through files of torch.distributed."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lingrad import optimizers
from lingrad.config.settings import MOVES
from lingrad.engine.saved import FORMAT
from lingrad.errors import CheckpointError
from tests.support.cases import BASES, SIDED, UNSIDED
from tests.support.models import every_kind, llama, text_batches, text_loss, token_batches, token_loss, train
from tests.support.runs import MODES, assert_same, each_mode, through_a_file

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
CARRIES = ("keep", "reset", "rotate", "transport")
OPTIONS = {
    **BASES,
    "adam": {"lr": 1e-2, "amsgrad": True},
    "rmsprop": {"lr": 1e-3, "centered": True},
    "adagrad": {"lr": 1e-2},
    "adafactor": {"lr": 1e-2},
    "muon": {"lr": 1e-2},
    "adamw8bit": {"lr": 1e-2, "min_8bit_size": 32},  # so that weights as small as these are quantised
}

# Refreshes in the steps after 0, 3, 6 finished ones; that of pca in every one, that of a right basis of kron after 2 and 4 too.
VARIANTS = [
    spec.format(side=side).replace("rank=4", "rank=3").replace("every=7", "every=3").replace("every=5", "every=2")
    for spec, side in zip((*SIDED, *UNSIDED), itertools.cycle(("short", "long", "both", "left", "right")))
]
MODULES = ("embed", "conv", "experts", "middle", "biased", "head")
# Transforms dealt out to the weights, round by round, so that each is tried on several.
DEALS = [{name: VARIANTS[(i + 5 * deal) % len(VARIANTS)] for i, name in enumerate(MODULES)} for deal in range(6)]


class Run:
    """A model, its optimizer and its schedule, made anew each time."""

    def __init__(self, build, make, loss, steps):
        self.model, self.loss = build(), loss
        self.optimizer = make(self.model)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def train(self, batches):
        for micro_batches in batches:
            train(self.model, self.optimizer, [micro_batches], self.loss, schedule=False)
            self.scheduler.step()
        return self

    def saved(self):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return through_a_file({name: part.state_dict() for name, part in parts.items()})

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        return self


NO_ROTATION = {"adafactor", "adamw8bit"}  # their states are factored or quantised, and refused
FACTORS = {"deal": range(len(DEALS)), "base": OPTIONS, "dtype": DTYPES, "mode": MODES, "at": (3, 4, 5), "carry": CARRIES}


def pairwise():
    """Few cases in which every two values of two factors meet: the one with most new pairs, again and again."""
    cases = [case for case in itertools.product(*FACTORS.values()) if case[5] not in MOVES or case[1] not in NO_ROTATION]
    pairs = {case: frozenset(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


@pytest.mark.thinned(4)
@pytest.mark.parametrize(list(FACTORS), pairwise())
def test_resuming_is_exact(deal, base, dtype, mode, at, carry):
    """Saved before (3), right after (4) and between (5) refreshes; every transform with every base, and all other pairs."""
    batches = token_batches(7)

    def run():
        options = {"weight_decay": 0.1, "scale": 0.25, "carry": carry} | OPTIONS[base]
        return Run(lambda: every_kind(DTYPES[dtype]), lambda m: MODES[mode](m, DEALS[deal], base, **options), token_loss, 7)

    straight = run().train(batches)
    saved = run().train(batches[:at]).saved()
    assert_same(run().load(saved).saved(), saved)
    assert_same(run().load(saved).train(batches[at:]).saved(), straight.saved())


def test_no_transform_and_no_base_is_left_out():
    assert {spec for deal in DEALS for spec in deal.values()} == set(VARIANTS)
    assert set(OPTIONS) == set(optimizers.names())


@each_mode
class TestSwitching:
    """The mode is part of a checkpoint; when it changed, or will, is not."""

    batches = token_batches(8)
    rules = DEALS[0]

    def run(self, mode):
        def make(model):
            return MODES[mode](model, self.rules, lr=1e-2, weight_decay=0.1)

        return Run(every_kind, make, token_loss, 8)

    @pytest.mark.parametrize("at", [3, 4])
    def test_after_loading(self, mode, at):
        other = "adapter" if mode == "optimizer" else "optimizer"
        ends = []
        for resumed in (False, True):
            run = self.run(mode).train(self.batches[:at])
            if resumed:
                run = self.run(mode).load(run.saved())
            run.train(self.batches[at:6])
            run.optimizer.switch(other)
            ends.append(run.train(self.batches[6:]).saved())
        assert_same(*ends)

    @pytest.mark.parametrize("at", [3, 4, 5])
    def test_before_saving(self, mode, at):
        other = "adapter" if mode == "optimizer" else "optimizer"
        run = self.run(mode).train(self.batches[:3])
        run.optimizer.switch(other)
        saved = run.train(self.batches[3:at]).saved()
        straight = run.train(self.batches[at:]).saved()
        made_so = self.run(other).load(saved).train(self.batches[at:])
        assert_same(made_so.saved(), straight)
        switched = self.run(mode)
        switched.optimizer.switch(other)
        assert_same(switched.load(saved).train(self.batches[at:]).saved(), straight)


@each_mode
@pytest.mark.parametrize("flat", [False, True])
class TestDistributedCheckpoint:
    """torch.distributed.checkpoint writes a folder, and reads into the state of a fresh run; one process will do."""

    @staticmethod
    def runs(kind, mode):
        if kind == "llama":
            batches, build, rules, loss = text_batches(8, micro=1), llama, "svd(rank=4, every=3)", text_loss
        else:
            batches, build, rules, loss = token_batches(8), every_kind, DEALS[kind], token_loss
        return batches, lambda: Run(build, lambda m: MODES[mode](m, rules, lr=1e-2, weight_decay=0.1), loss, 8)

    @pytest.mark.thinned(3)
    # deals 0, 1 and 2 hold every transform
    @pytest.mark.parametrize(("kind", "at"), [("llama", 4), (0, 3), (1, 4), (2, 5)])
    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
    def test_through_its_files(self, kind, mode, at, flat, tmp_path):
        batches, make = self.runs(kind, mode)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)

        def states(run):
            optim = get_optimizer_state_dict(run.model, run.optimizer, options=options)
            return {"model": get_model_state_dict(run.model, options=options), "optim": optim}

        run = make().train(batches[:at])
        scheduler = run.scheduler.state_dict()
        dcp.save(states(run), checkpoint_id=tmp_path)
        straight = run.train(batches[at:])
        resumed = make()
        found = states(resumed)
        dcp.load(found, checkpoint_id=tmp_path)
        set_model_state_dict(resumed.model, found["model"], options=options)
        set_optimizer_state_dict(resumed.model, resumed.optimizer, found["optim"], options=options)
        resumed.scheduler.load_state_dict(scheduler)
        assert_same(resumed.train(batches[at:]).saved(), straight.saved())


RULES = {"biased": "svd(rank=3, every=3)", "experts": "random(rank=3, every=3)", "conv": "pca(rank=3, side=left)"}


def small_run(mode, build=every_kind, rules=RULES, base="adamw", **options):
    return Run(build, lambda m: MODES[mode](m, rules, base, **{"lr": 1e-2} | options), token_loss, 8)


def index_of(state, name):
    """The index of a parameter in a state dict."""
    return next(g["params"][g["param_names"].index(name)] for g in state["param_groups"] if name in g["param_names"])


@each_mode
class TestRefused:
    """A run of four steps is given what is not its own: CheckpointError, and it trains on as if nothing had happened."""

    batches = token_batches(7)

    def refuse(self, mode, state, message, **own):
        run, untouched = (small_run(mode, **own).train(self.batches[:4]) for _ in range(2))
        before = run.saved()
        with pytest.raises(CheckpointError, match=message):
            run.optimizer.load_state_dict(state)
        assert_same(run.saved(), before)
        assert_same(run.train(self.batches[4:]).saved(), untouched.train(self.batches[4:]).saved())

    def saved(self, mode, **own):
        return small_run(mode, **own).train(self.batches[:5]).saved()["optimizer"]

    @pytest.mark.parametrize("number", [0, 2, "3"])
    def test_another_format(self, mode, number):
        state = self.saved(mode)
        for group in state["param_groups"]:
            group["format"] = number
        self.refuse(mode, state, f"the checkpoint has format {number!r}, this run has {FORMAT}")

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (
                {"rules": {**RULES, "biased": "svd(rank=3, every=4)"}},
                r"entry 2: the checkpoint has config string 'svd\(rank=3, every=4\)', this run has 'svd\(rank=3, every=3\)'",
            ),
            (
                {"rules": {**RULES, "experts": "random(rank=3, every=3, kind=rows)"}},
                r"entry 1: the checkpoint has config string 'random\(rank=3, every=3, kind=rows\)', this run has 'random",
            ),
            ({"rules": {**RULES, "head": "svd(rank=3)"}}, "the checkpoint has 4 params, this run has 3"),
            ({"base": "adagrad"}, "the checkpoint has base 'adagrad', this run has 'adamw'"),
            ({"base": torch.optim.NAdam}, "the checkpoint has base 'NAdam', this run has 'adamw'"),
            ({"moments": "8bit_linear"}, r"base .adamw\(moments=8bit_linear\)., this run has .adamw.; .* base and moments=$"),
            ({"seed": 3}, "the checkpoint has seed 3, this run has 0"),
        ],
    )
    def test_another_run(self, mode, other, message):
        self.refuse(mode, self.saved(mode, **other), message)

    def test_the_other_mode(self, mode):
        other = "adapter" if mode == "optimizer" else "optimizer"
        self.refuse(mode, self.saved(other), f"mode '{other}', this run has '{mode}'; call opt.switch\\('{other}'\\) before")

    def test_other_names(self, mode):
        class Renamed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = every_kind()

            def forward(self, ids):
                return self.inner(ids)

        rules = {f"*{name}": spec for name, spec in RULES.items()}
        state = self.saved(mode, build=Renamed, rules=rules)
        self.refuse(mode, state, "parameter 'inner.conv.weight', this run has 'conv.weight'", rules=rules)

    @pytest.mark.parametrize(
        ("rules", "base", "message"),
        [
            ({"middle": "svd(rank=3)"}, "adamw", "middle.weight is .*12.*"),
            # no tensor tells: coordinates are [14, 3] in both, SGD keeps no moments, the basis is drawn again
            ({"middle": "random(rank=3)"}, "sgd", "middle.weight is .*12.*"),
            # moments have fewer dimensions than the weight
            ({"biased": "random(rank=3)"}, "adafactor", "'exp_avg_sq_col' of experts.gate_up_proj is .*12.*"),
        ],
    )
    def test_other_shapes(self, mode, rules, base, message):
        def build(width=10):
            model = every_kind(middle=lambda: nn.Linear(width, 14, bias=False))
            model.experts.gate_up_proj = nn.Parameter(torch.linspace(-1, 1, 36 * width).view(3, 12, width).double())
            return model

        state = self.saved(mode, build=lambda: build(12), rules=rules, base=base)
        self.refuse(mode, state, message + " in the checkpoint, and", build=build, rules=rules, base=base)

    @pytest.mark.parametrize(
        ("weight", "key"),
        [
            ("biased.weight", "subspace.step"),
            ("biased.weight", "subspace.state.basis"),
            ("experts.gate_up_proj", "subspace.state.seed"),
            ("conv.weight", "subspace.state.left_memory.exp_avg_sq"),
            ("biased.weight", "exp_avg"),
            ("embed.weight", "exp_avg_sq"),
            ("biased.bias", "exp_avg"),
        ],
    )
    def test_one_entry_missing(self, mode, weight, key):
        state = self.saved(mode)
        entries = state["state"][index_of(state, weight)]
        if key == "subspace.state.basis":
            (key,) = entries.keys() & {"subspace.state.left", "subspace.state.right"}
        del entries[key]
        self.refuse(mode, state, f"the checkpoint has no '{key}' for {weight}")

    def test_all_entries_of_a_weight_missing(self, mode):
        state = self.saved(mode)
        del state["state"][index_of(state, "biased.weight")]
        self.refuse(mode, state, "the checkpoint has no 'subspace.[a-z]+' for biased.weight")

    @pytest.mark.parametrize(
        ("weight", "key", "convert"),
        [
            ("biased.weight", "subspace.step", lambda step: "five"),
            ("experts.gate_up_proj", "subspace.state.seed", lambda seed: None),
            ("biased.weight", "subspace.state.basis", torch.Tensor.long),
            ("conv.weight", "subspace.state.left_memory.exp_avg", torch.Tensor.long),
            ("biased.weight", "exp_avg", torch.Tensor.long),
            ("embed.weight", "exp_avg", torch.Tensor.bool),
            ("biased.bias", "exp_avg_sq", lambda tensor: float(tensor.sum())),
        ],
    )
    def test_an_entry_of_another_kind(self, mode, weight, key, convert):
        state = self.saved(mode)
        entries = state["state"][index_of(state, weight)]
        if key == "subspace.state.basis":
            (key,) = entries.keys() & {"subspace.state.left", "subspace.state.right"}
        entries[key] = convert(entries[key])
        self.refuse(mode, state, f"'{key}' of {weight} is .* in the checkpoint, and")

    def test_a_truncated_file(self, mode, tmp_path):
        run, untouched = (small_run(mode).train(self.batches[:4]) for _ in range(2))
        before = run.saved()
        path = tmp_path / "run.pt"
        torch.save(before, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises((RuntimeError, OSError, ValueError)):  # torch's own, which depends on where the file ends
            run.load(torch.load(path, weights_only=True))
        assert_same(run.saved(), before)
        assert_same(run.train(self.batches[4:]).saved(), untouched.train(self.batches[4:]).saved())

    def test_another_program_s_checkpoint(self, mode):
        model = every_kind()
        groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) == wide]} for wide in (True, False)]
        groups.insert(0, {"params": [groups[0]["params"].pop() for _ in range(3)]})
        self.refuse(mode, torch.optim.AdamW(groups).state_dict(), "it was not written by lingrad's optimizer")


@each_mode
@pytest.mark.parametrize(
    ("base", "dtype"), [("adamw", "float64"), ("adamw", "bfloat16"), ("adamw8bit", "float32"), ("adafactor", "bfloat16")]
)
def test_loading_its_own_state_is_the_identity(mode, base, dtype):
    """In mid-run and in the same object, as accelerate does; dtypes are those of before, whatever that of the weight."""
    batches = token_batches(8)
    run, untouched = (
        small_run(mode, lambda: every_kind(DTYPES[dtype]), DEALS[2], base, **OPTIONS[base]).train(batches[:2]) for _ in range(2)
    )
    for step in range(2, 8):  # on refresh steps and off them
        before = run.saved()["optimizer"]
        run.optimizer.load_state_dict(run.optimizer.state_dict())
        assert_same(run.saved()["optimizer"], before)
        run.train(batches[step : step + 1])
    assert_same(run.saved(), untouched.train(batches[2:]).saved())
    held = {value.dtype for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    coded = any(spec.startswith("coded") for group in run.optimizer.param_groups for spec in group.get("specs", ()))
    assert (torch.uint8 in held) == (base == "adamw8bit" or coded)
    if base == "adamw":
        expected = {torch.float64} if dtype == "float64" else {torch.float32}
        coords = [run.optimizer.state[sub.coords] for sub in run.optimizer.subspaces]
        assert {state[key].dtype for state in coords for key in ("exp_avg", "exp_avg_sq")} == expected


@each_mode
def test_training_on_leaves_what_was_loaded_as_it_was(mode):
    """A run shares no memory with the dict it was loaded from."""
    batches = token_batches(6)
    saved = small_run(mode, rules=DEALS[0]).train(batches[:3]).saved()
    copied = through_a_file(saved)
    small_run(mode, rules=DEALS[0]).load(saved).train(batches[3:])
    assert_same(saved, copied)
