"""Rounds of a decentralised run: what they refuse, what differs between workers, and what goes wrong in one."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lingrad
from lingrad.decentralized import Rounds, Workers, simulate
from lingrad.errors import CheckpointError, ExchangeError, ModeError, SpecError
from tests.support.workers import EVERY, RUN, Small, loss_of, program, weights

WORKERS = 3
IDENTICAL, ORTHOGONAL = "slice(rank=2, every=8, choice=identical, side=left)", "slice(rank=2, every=8, workers=3, side=left)"


def test_another_workers_checkpoint_is_refused():
    saved = {}
    with pytest.raises(CheckpointError) as found:
        simulate(lambda workers: program_step(workers, saved), 2)
    message = "this is the checkpoint of worker 0, whose coordinates and moments are of its own slice, and this is worker 1"
    assert message in str(found.value)


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
    spec = ORTHOGONAL

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


def test_what_is_not_finite_costs_one_round_where_biases_train():
    """All of its moments are new, those of biases too."""
    left_out = []

    def train(workers):
        model = Small()
        optimizer = lingrad.adapt(model, {"*": IDENTICAL}, rounds=Rounds(workers=workers, every=2), **RUN)
        for step in range(8):
            optimizer.zero_grad()
            loss = loss_of(model, step, workers.number)
            (loss * (float("nan") if workers.number == 1 and step == 2 else 1)).backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            left_out.extend(step for warning in caught if "its round is left out" in str(warning.message))
        return weights(optimizer)

    one, other = simulate(train, 2)
    assert len(left_out) == 2  # each says so, of one round
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_weights_decay_alike_where_a_worker_has_no_gradient():
    def train(workers):
        model = Small()
        optimizer = lingrad.adapt(model, {"*": IDENTICAL}, rounds=Rounds(workers=workers, every=2), **RUN)
        for step in range(4):
            optimizer.zero_grad()
            if workers.number or step != 1:
                loss_of(model, step, workers.number).backward()
            optimizer.step()
        return weights(optimizer)

    one, other = simulate(train, 2)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_failed_exchange_ends_the_run():
    """Caught, it says so again, and does not go on; one by hand can be repeated."""
    seen = []

    class Failing(Workers):
        def gather(self, give):
            seen.append(give())
            if len(seen) < 3:
                raise ExchangeError("a cable was cut")
            return {0: seen[-1]}

    model = Small()
    made = Rounds(workers=Failing(0), every=EVERY)
    optimizer = lingrad.adapt(model, {"*": "slice(rank=2)"}, rounds=made, **RUN)
    for _ in range(2):
        loss_of(model, 0, 0).backward()
        optimizer.step()
    for _ in range(2):
        with pytest.raises(ExchangeError, match="a cable was cut"):
            optimizer.exchange()
    optimizer.exchange()
    assert len(seen) == 3
    assert not any(sub.coords.any() for sub in optimizer.subspaces)
    seen.clear()
    optimizer.step()
    with pytest.raises(ExchangeError, match="a cable was cut"):
        optimizer.step()
    for call in (optimizer.step, optimizer.exchange):
        with pytest.raises(ExchangeError) as found:
            call()
        assert "the exchange after step 4 has failed, and this worker's weights are not those of the others" in str(found.value)
    assert len(seen) == 1


def test_resumed_in_rounds_of_another_length():
    """What was trained before is exchanged, and what was exchanged is not exchanged again."""
    options = {"combine": "mean", "lr": 0.7, "momentum": 0.9}
    spec = "slice(rank=2, every=0, choice=identical)"

    def train(workers, at, every):
        model = Small()
        first = lingrad.adapt(model, {"*": spec}, rounds=Rounds(workers=workers, every=4, **options), **RUN)
        for step in range(at):
            first.zero_grad()
            loss_of(model, step, workers.number).backward()
            first.step()
        state = copy.deepcopy((model.state_dict(), first.state_dict()))
        again = Small()
        second = lingrad.adapt(again, {"*": spec}, rounds=Rounds(workers=workers, every=every, **options), **RUN)
        again.load_state_dict(state[0])
        second.load_state_dict(state[1])
        before, sent = weights(second), workers.sent
        second.exchange()
        return weights(second), before, workers.sent - sent

    for at, every, sends in ((6, 3, True), (8, 5, False)):
        (one, before, sent), (other, _, _) = simulate(lambda w, at=at, every=every: train(w, at, every), 2)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert (sent > 0) is sends
        assert all(torch.equal(value, before[name]) for name, value in one.items()) is not sends


def test_nobody_is_finite():
    def train(workers):
        model = Small()
        optimizer = lingrad.adapt(model, {"*": IDENTICAL}, rounds=Rounds(workers=workers, every=1), **RUN)
        (loss_of(model, 0, 0) * float("inf")).backward()
        optimizer.step()

    with pytest.raises(ExchangeError, match="no worker has sent finite values by step 1; lower"):
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
        model.kept = nn.Parameter(torch.ones(3), requires_grad=False)
        with torch.no_grad():
            if options.pop("other", False):
                model.first.weight.mul_(-1)
            if options.pop("slightly", False):
                model.second.weight[3, 5] += 1e-12
            if options.pop("frozen", False):
                model.kept.mul_(2)
        steps = options.pop("steps", 2)
        more = {"seed": options["seed"], "weight_decay": options.get("decay", 0.1)}
        made = Rounds(workers=workers, every=options["every"], combine=options.get("combine", "sum"))
        optimizer = lingrad.adapt(model, {"*": options["spec"]}, options.get("base", "adamw"), rounds=made, lr=1e-2, **more)
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
        ({"seed": 1}, "workers 0 and 1 differ in their rules, base, seed, carry, options of Rounds, trained parameters, or in"),
        ({"combine": "mean"}, "workers 0 and 1 differ in their rules, base, seed, carry, options of Rounds"),
        ({"spec": "slice(rank=2, workers=3)"}, "workers 0 and 1 differ in their rules, base, seed, carry, options"),
        ({"decay": 0.2}, "or in lr where weights decay, and would make other changes than were trained"),
        ({"base": "sgd"}, "workers 0 and 1 differ in their rules, base"),
        ({"frozen": True}, "workers 0 and 1 hold different weights: load the same checkpoint in all of them before the run"),
        ({"slightly": True}, "workers 0 and 1 hold different weights: load the same checkpoint in all of them before the run"),
        ({"spec": "slice(rank=3, workers=2)"}, "their models, rules or options of Rounds differ; start all of them"),
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
    compared = 24 + 8 * 16 * len(found[0][0]["weights"]) + 24  # step and options, samples of each weight, the head
    assert found[0][1] == 3 * 2 * (8 * coords + compared)
    coded = simulate(lambda workers: (program(workers, spec, steps=steps, send="8bit"), workers.sent), 3)
    assert (coded[0][1] - 3 * 2 * compared) < 0.16 * (found[0][1] - 3 * 2 * compared)  # of 8 bytes one, and a scale for 256
