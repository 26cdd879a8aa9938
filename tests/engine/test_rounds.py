"""Rounds of a decentralised run against the same mathematics written out on whole weights, with plain torch."""

import copy

import pytest
import torch
from torch import nn

import lingrad
from lingrad.decentralized import Rounds, simulate
from lingrad.errors import CheckpointError, ExchangeError, ModeError, SpecError
from lingrad.optimizers.codes import code_book, dequantize, quantize
from tests.support.workers import EVERY, program, weights

EXACT = 1e-12  # float64 in another order, over a few steps
WORKERS, STEPS = 3, 10
SIDES = ("left", "right", "both")


class Small(nn.Module):
    """Two linear layers with a bias each, of no square weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(9, 12), nn.Linear(12, 7)
        self.to(torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def inputs(step, number):
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(5, 9, generator=generator, dtype=torch.float64), torch.randn(
        5, 7, generator=generator, dtype=torch.float64
    )


def loss_of(model, step, number):
    x, y = inputs(step, number)
    return (model(x) - y).square().mean()


RUN = {"lr": 1e-2, "weight_decay": 0.1}


def work(spec, run=None, steps=STEPS, seen=None, **rounds):
    """What a worker does; ``seen`` gets each worker's optimizer."""

    def train(workers):
        model = Small()
        made = Rounds(workers=workers, **{"every": EVERY, **rounds})
        optimizer = lingrad.adapt(model, {"*": spec}, "adamw", rounds=made, **{**RUN, **(run or {})})
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, step, workers.number).backward()
            optimizer.step()
            if seen is not None:
                seen(workers.number, step, optimizer)
        if steps % EVERY:
            optimizer.exchange()
        return weights(optimizer)

    return train


def rounded(coords, send):
    if send == "8bit":
        book = code_book("8bit", signed=True)
        return dequantize(*quantize(coords, book), book)
    return coords if send == "full" else coords.to(torch.bfloat16).to(coords.dtype)


def written_out(spec, maps, *, combine="sum", moments="keep", lr=1.0, momentum=0.0, send="full", steps=STEPS):
    """Every worker's z trained by torch's AdamW through W + S_k z, and W changed by torch's SGD at the end of each round.

    ``maps[step][k][name]`` is the map of worker k in that step.
    """
    model = Small()
    whole = {name: param.detach().clone() for name, param in model.named_parameters()}
    matrices = [name for name, value in whole.items() if value.dim() == 2]
    outer = {name: nn.Parameter(whole[name]) for name in matrices}
    sgd = torch.optim.SGD(outer.values(), lr=lr, momentum=momentum, nesterov=bool(momentum))
    own = []  # of each worker: parameters that are trained, and their optimizer
    for k in range(WORKERS):
        z = {name: nn.Parameter(torch.zeros_like(maps[0][k][name].project(whole[name]))) for name in matrices}
        rest = {name: nn.Parameter(value.clone()) for name, value in whole.items() if name not in matrices}
        own.append((z, rest, torch.optim.AdamW([*z.values(), *rest.values()], lr=RUN["lr"], weight_decay=0.0)))
    decay = 1 - RUN["lr"] * RUN["weight_decay"]
    for step in range(steps):
        for k, (z, rest, adam) in enumerate(own):
            adam.zero_grad()
            full = {name: outer[name].detach() + maps[step][k][name].lift(z[name]) for name in matrices} | rest
            x, y = inputs(step, k)
            (torch.func.functional_call(model, full, (x,)) - y).square().mean().backward()
            with torch.no_grad():
                for param in (*z.values(), *rest.values()):
                    param.mul_(decay)
            adam.step()
        with torch.no_grad():
            for name in matrices:
                outer[name].mul_(decay)
        learned = step == 0 and "by_gradient" in spec  # a basis that is learned in a step ends the round
        if (step + 1) % EVERY and step + 1 < steps and not learned:
            continue
        with torch.no_grad():
            share = 1 / WORKERS if combine == "mean" else 1
            for name in matrices:
                found = [maps[step][k][name].lift(rounded(z[name], send)) for k, (z, _, _) in enumerate(own)]
                outer[name].grad = -share * sum(found)
            sgd.step()
            for name in own[0][1]:
                mean = torch.stack([rest[name].detach() for _, rest, _ in own]).mean(0)
                for _, rest, _ in own:
                    rest[name].copy_(mean)
            for z, _, adam in own:
                for coords in z.values():
                    coords.zero_()
                    if moments == "reset":
                        adam.state.pop(coords, None)
    return {name: outer[name].detach() for name in matrices} | {name: value.detach() for name, value in own[0][1].items()}


def maps_of(spec, steps=STEPS, **options):
    """The maps that every worker had in every step, and what the workers ended with."""
    maps = [[{} for _ in range(WORKERS)] for _ in range(steps)]
    pending = {}

    def seen(number, step, optimizer):
        # a map is that of the step's forward: bases change at the end of step()
        for sub in optimizer.subspaces:
            maps[step][number][sub.name] = pending.get((number, sub.name)) or first[number][sub.name]
            pending[number, sub.name] = sub.map()

    first = [{} for _ in range(WORKERS)]

    def train(workers):
        made = Rounds(workers=workers, **{"every": EVERY, **{k: v for k, v in options.items() if k != "run"}})
        probe = lingrad.adapt(Small(), {"*": spec}, "adamw", rounds=made, **{**RUN, **options.get("run", {})})
        first[workers.number] = {sub.name: sub.map() for sub in probe.subspaces}
        return work(spec, steps=steps, seen=seen, **options)(workers)

    return maps, simulate(train, WORKERS)


def assert_equal(found, expected, tolerance=EXACT):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


SPECS = (
    "slice(rank=2, every=8, choice=identical, side={side})",
    "slice(rank=2, every=8, choice=independent, side={side})",
    "slice(rank=2, every=8, workers=3, side={side})",
    "slice(rank=2, every=4, workers=3, choice=by_gradient, side={side})",
    "slice(rank=2, every=0, workers=3, side={side})",
)
OPTIONS = (
    {},
    {"combine": "mean"},
    {"moments": "reset"},
    {"lr": 0.5},
    {"combine": "mean", "lr": 0.7, "momentum": 0.9},
    {"send": "8bit"},
    {"send": "bfloat16"},
)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spec", SPECS)
def test_against_the_formula(spec, side, options):
    """All kinds of slices, on every side; workers agree to the bit."""
    spec = spec.format(side=side)
    maps, found = maps_of(spec, **options)
    assert_equal(found[0], written_out(spec, maps, **options))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("options", [{"combine": "mean", "lr": 0.7, "momentum": 0.9}, {"combine": "mean"}], ids=str)
def test_whole_weights_are_diloco(options):
    """full() with rounds: AdamW in each worker, and Nesterov's outer step on the mean of their changes."""
    maps, found = maps_of("full()", **options)
    assert_equal(found[0], written_out("full()", maps, **options))


def test_a_change_of_bases_carries_moments():
    """carry is another choice than what a round's end does to moments."""
    spec = "slice(rank=2, every=4, workers=3)"
    kept, reset = (simulate(work(spec, run={"carry": carry}), WORKERS)[0] for carry in ("keep", "reset"))
    every = simulate(work(spec, moments="reset"), WORKERS)[0]
    assert_equal(reset, every)  # bases change at the end of each round here
    assert not torch.equal(kept["first.weight"], reset["first.weight"])
    rotated = simulate(work(spec, run={"carry": "rotate"}), WORKERS)[0]
    assert not torch.equal(kept["first.weight"], rotated["first.weight"])


def test_a_round_ends_by_hand():
    """exchange() after 10 steps of rounds of 4; before it, each worker has its own change."""
    before = {}

    def seen(number, step, optimizer):
        if step == STEPS - 1:
            before[number] = weights(optimizer)

    found = simulate(work(SPECS[2].format(side="left"), seen=seen), WORKERS)
    assert not torch.equal(before[0]["first.weight"], before[1]["first.weight"])
    assert torch.equal(found[0]["first.weight"], found[1]["first.weight"])


def test_a_round_without_a_step_changes_nothing():
    """Nor does an outer momentum, at the end of a round or after a checkpoint of that moment was loaded."""
    found = {}

    def train(workers):
        made = Rounds(workers=workers, every=EVERY, combine="mean", lr=0.7, momentum=0.9)
        model = Small()
        optimizer = lingrad.adapt(model, {"*": SPECS[0].format(side="left")}, rounds=made, **RUN)
        optimizer.exchange()
        for step in range(EVERY):
            optimizer.zero_grad()
            loss_of(model, step, workers.number).backward()
            optimizer.step()
        found["sent"], before = workers.sent, weights(optimizer)
        optimizer.exchange()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.exchange()
        assert all(torch.equal(value, before[name]) for name, value in weights(optimizer).items())
        assert workers.sent == found["sent"] > 0

    simulate(train, 2)


@pytest.mark.parametrize("spec", [spec.format(side="both") for spec in SPECS[1:4]])
def test_what_all_workers_have_done_is_in_the_ledger(spec):
    """ledger=True: the change of each weight, merged by all, as factors."""
    changes = {}

    def seen(number, step, optimizer):
        if step == 7:  # the end of a round
            changes[number] = {name: (change.factors.dense(), change.decay) for name, change in optimizer.changes().items()}

    found = simulate(work(spec, run={"ledger": True}, steps=8, seen=seen), WORKERS)
    begun = dict(Small().named_parameters())
    for own in changes.values():
        for name, (change, decay) in own.items():
            torch.testing.assert_close(begun[name].detach() * decay + change, found[0][name], rtol=0, atol=EXACT)


@pytest.mark.parametrize("saved_after", [8, 6])
@pytest.mark.parametrize("spec", [SPECS[2].format(side="left"), SPECS[3].format(side="right")])
def test_resumed_to_the_bit(spec, saved_after):
    """Saved at the end of a round and in the middle of one, with an outer momentum."""
    options = {"combine": "mean", "lr": 0.7, "momentum": 0.9}
    files = {}

    def seen(number, step, optimizer):
        if step + 1 == saved_after:
            files[number] = copy.deepcopy((optimizer.model.state_dict(), optimizer.state_dict()))

    expected = simulate(work(spec, seen=seen, **options), WORKERS)

    def resumed(workers):
        model = Small()
        made = Rounds(workers=workers, every=EVERY, **options)
        optimizer = lingrad.adapt(model, {"*": spec}, "adamw", rounds=made, **RUN)
        model.load_state_dict(files[workers.number][0])
        optimizer.load_state_dict(files[workers.number][1])
        for step in range(saved_after, STEPS):
            optimizer.zero_grad()
            loss_of(model, step, workers.number).backward()
            optimizer.step()
        optimizer.exchange()
        return weights(optimizer)

    for own, other in zip(simulate(resumed, WORKERS), expected, strict=True):
        assert all(torch.equal(own[name], value) for name, value in other.items())


def test_another_workers_checkpoint_is_refused():
    saved = {}
    with pytest.raises(CheckpointError) as found:
        simulate(lambda workers: program_step(workers, saved), 2)
    assert "subspace.state.number' of first.weight is 0 in the checkpoint, and 1 in this run" in str(found.value)


def program_step(workers, saved):
    """One step, and the state of the worker before."""
    model = Small()
    optimizer = lingrad.adapt(model, {"*": "slice(rank=2, workers=3)"}, rounds=Rounds(workers=workers, every=1), **RUN)
    loss_of(model, 0, workers.number).backward()
    optimizer.step()
    saved[workers.number] = optimizer.state_dict()
    if workers.number == 1:
        optimizer.load_state_dict(saved[0])


def test_what_is_not_finite_is_left_out():
    """The others go on as if that worker had not been there, and it goes on with them from their weights."""
    spec = SPECS[2].format(side="left")

    def train(spoilt):
        def one(workers):
            model = Small()
            optimizer = lingrad.adapt(model, {"*": spec}, rounds=Rounds(workers=workers, every=EVERY), **RUN)
            for step in range(2 * EVERY):
                optimizer.zero_grad()
                loss = loss_of(model, step, workers.number)
                (loss * (float("nan") if spoilt and workers.number == 1 and step == 2 else 1)).backward()
                optimizer.step()
                if step + 1 == EVERY and workers.number == 1 and not spoilt:
                    return None
            return weights(optimizer)

        return one

    with pytest.warns(RuntimeWarning, match="worker 1 sent values that are not finite; its round is left out"):
        found = simulate(train(True), WORKERS)
    assert all(value.isfinite().all() for value in found[1].values())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_nobody_is_finite():
    def train(workers):
        model = Small()
        optimizer = lingrad.adapt(model, {"*": SPECS[0].format(side="left")}, rounds=Rounds(workers=workers, every=1), **RUN)
        (loss_of(model, 0, 0) * float("inf")).backward()
        optimizer.step()

    with pytest.warns(RuntimeWarning), pytest.raises(ExchangeError, match="no worker has sent finite values by step 1; lower"):
        simulate(train, 2)


def test_four_bit_weights_stay_alike():
    """The base may be NF4: every worker quantises the same sum, so that all hold the same codes."""
    bnb = pytest.importorskip("bitsandbytes")

    def train(workers):
        torch.manual_seed(0)
        model = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
        optimizer = lingrad.adapt(model, "slice(rank=4, every=6, workers=2)", rounds=Rounds(workers=workers, every=3), lr=1e-2)
        for step in range(6):
            optimizer.zero_grad()
            torch.manual_seed(step + 10 * workers.number)
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()
        return model[0].weight.detach().clone(), optimizer.merge_losses()["0.weight"].merges

    (one, merges), (other, _) = simulate(train, 2)
    assert torch.equal(one, other)
    assert merges == 2


def differing(change):
    """Two workers of whom the second differs."""

    def train(workers):
        options = {"spec": "slice(rank=2, workers=2)", "seed": 0, "every": 2, "scale": 1.0} | (change if workers.number else {})
        model = Small()
        if options.pop("other", False):
            with torch.no_grad():
                model.first.weight.mul_(-1)
        steps = options.pop("steps", 2)
        made = Rounds(workers=workers, every=options["every"], combine=options.get("combine", "sum"))
        optimizer = lingrad.adapt(model, {"*": options["spec"]}, rounds=made, lr=1e-2, seed=options["seed"])
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, step, 0).backward()
            optimizer.step()
        if steps != 2:
            optimizer.exchange()

    return train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seed": 1},
            "workers 0 and 1 differ in their rules, seed, options of Rounds or trained parameters, and would merge into",
        ),
        ({"combine": "mean"}, "workers 0 and 1 differ in their rules, seed, options of Rounds or trained parameters"),
        ({"spec": "slice(rank=2, workers=3)"}, "workers 0 and 1 differ in their rules, seed, options of Rounds"),
        (
            {"spec": "slice(rank=3, workers=2)"},
            "their models, rules or options of Rounds differ; start all of them with the same",
        ),
        ({"other": True}, "workers 0 and 1 hold different weights: load the same checkpoint in all of them before the run"),
        ({"steps": 1}, "worker 0 has made 2 steps and worker 1 1: workers must start together, and make equally many steps"),
    ],
    ids=str,
)
def test_workers_that_differ(change, message):
    with pytest.raises(ExchangeError) as found:
        simulate(differing(change), 2)
    assert message in str(found.value)


def one_worker(rules="slice(rank=2)", start="adapt", rounds=None, **options):
    def train(workers):
        made = Rounds(workers=workers, every=4) if rounds is None else rounds
        return getattr(lingrad, start)(Small(), {"*": rules}, lr=1e-2, rounds=made, **options)

    return simulate(train, 1)[0]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"start": "wrap"}, SpecError, "optimizer mode merges them at every step. Use lingrad.adapt(..., rounds=...)"),
        ({"stagger": True}, SpecError, "stagger merges or changes bases at other steps than the end of a round"),
        ({"layerwise": True}, SpecError, "layerwise merges or changes bases at other steps than the end of a round"),
        ({"merge_every": 2}, SpecError, "merge_every merges or changes bases at other steps than the end of a round"),
        ({"rules": "svd(rank=2)"}, SpecError, "first.weight has the transform svd, whose basis other workers do not know"),
        (
            {"rules": "slice(rank=2, every=6)"},
            SpecError,
            "change every 6 steps, and a round has 4: slices change at the end of a",
        ),
        ({"rules": "none"}, SpecError, "'rounds' has no effect where nothing is transformed; leave it out"),
        ({"rounds": 3}, SpecError, "rounds must be a lingrad.decentralized.Rounds, or None, not 3"),
    ],
    ids=str,
)
def test_what_does_not_go_with_rounds(given, error, message):
    with pytest.raises(error) as found:
        one_worker(**given)
    assert message in str(found.value)


def test_rounds_are_for_adapter_mode_only():
    optimizer = one_worker()
    with pytest.raises(SpecError, match="optimizer mode merges them at every step"):
        optimizer.switch("optimizer")
    assert optimizer.mode == "adapter"


def test_a_run_without_rounds():
    with pytest.raises(ModeError, match="this run has no rounds"):
        lingrad.adapt(Small(), "slice(rank=2)", lr=1e-2).exchange()
    with pytest.raises(SpecError) as found:
        lingrad.adapt(Small(), "slice(rank=2, workers=2)", lr=1e-2)
    assert "first.weight trains in one worker's slice of several, and the run has no rounds" in str(found.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a number of steps, 1 or more, not 0"),
        ({"combine": "average"}, "combine must be one of sum, mean, not 'average'"),
        ({"moments": "rotate"}, "moments must be one of keep, reset, not 'rotate'"),
        ({"momentum": 1.0}, "momentum of the outer step must be 0 or more and below 1.0, not 1.0"),
        ({"lr": -1}, "lr of the outer step must be 0 or more and below inf, not -1"),
        ({"send": "4bit"}, "send must be one of full, bfloat16, 8bit, not '4bit'"),
    ],
    ids=str,
)
def test_options_of_rounds(options, message):
    with pytest.raises(SpecError) as found:
        simulate(lambda workers: Rounds(workers=workers, **options), 1)
    assert message in str(found.value)
    with pytest.raises(SpecError, match="workers must be one of lingrad.decentralized's, such as ProcessWorkers"):
        Rounds(workers=3)


def test_bytes_sent():
    """Coordinates alone, where nothing else trains: each of N workers passes on N - 1 messages."""
    spec, steps = "slice(rank=4, every=8, workers=3)", 12
    found = simulate(lambda workers: (program(workers, spec, steps=steps), workers.sent), 3)
    coords = sum(4 * max(weight.shape) for weight in found[0][0]["weights"].values() if weight.dim() == 2)
    compared = 16 + 8 * 16 * len(found[0][0]["weights"]) + 24  # step and options, samples of each weight, the head
    assert found[0][1] == 3 * 2 * (8 * coords + compared)
    coded = simulate(lambda workers: (program(workers, spec, steps=steps, send="8bit"), workers.sent), 3)
    assert (coded[0][1] - 3 * 2 * compared) < 0.16 * (found[0][1] - 3 * 2 * compared)  # of 8 bytes one, and a scale for 256
