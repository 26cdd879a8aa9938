"""Rounds of a decentralised run against the same mathematics written out on whole weights, with plain torch."""

import copy

import pytest
import torch
from torch import nn

import lingrad
from lingrad.decentralized import Rounds, simulate
from lingrad.optimizers.codes import code_book, dequantize, quantize
from tests.support.workers import EVERY, RUN, Small, inputs, loss_of, weights

EXACT = 1e-12  # float64 in another order, over a few steps
WORKERS, STEPS = 3, 10
SIDES = ("left", "right", "both")


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
