"""Learning rates by param group: ``lr`` of the coordinates, ``rest_lr`` of what trains in full.

Tolerance of weights: 1e-12 in float64, relative, over a run: both sides compute the same in another order.
"""

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import SpecError
from tests.support.layers import inputs
from tests.support.models import gap, llama, text_batches, text_loss, three_ways, train, zoo
from tests.support.runs import MODES, each_mode, through_a_file

TOLERANCE = 1e-12
SPEC = "svd(rank=4, every=3)"


def rates(optimizer):
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def trained(model, optimizer, steps=7, **options):
    train(model, optimizer, text_batches(steps), **options)
    return {name: weight.detach().clone() for name, weight in optimizer.weights().items()}


@each_mode
class TestARun:
    @pytest.mark.parametrize(("given", "rest"), [({}, 1e-2), ({"rest_lr": None}, 1e-2), ({"rest_lr": 2e-3}, 2e-3)])
    def test_what_trains_in_full_has_its_own_rate(self, mode, given, rest):
        optimizer = MODES[mode](llama(), SPEC, lr=1e-2, **given)
        assert rates(optimizer) == {"coords": 1e-2, "matrices": rest, "vectors": rest}

    def test_full_rank_is_adamw_with_two_groups(self, mode):
        """With ``full()`` coordinates are the weight itself, in torch's own optimizer a group at ``lr``."""
        plain, model = llama(), llama()
        optimizer = MODES[mode](model, "full()", lr=1e-2, rest_lr=1e-3, weight_decay=0.1)
        transformed = {sub.name for sub in optimizer.subspaces}
        groups = [[p for n, p in plain.named_parameters() if (n in transformed) is coords] for coords in (True, False)]
        stock = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "lr": 1e-3}], lr=1e-2, weight_decay=0.1)
        batches = text_batches(10)
        train(plain, stock, batches)  # both along a cosine, which multiplies each group's own rate
        train(model, optimizer, batches)
        assert gap(optimizer.weights(), dict(plain.named_parameters())) <= TOLERANCE

    def test_a_run_written_out(self, mode):
        """W = W0 + P z with z stepped at ``lr`` and the bias at ``rest_lr``, by two optimizers of torch's."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer = MODES[mode](model, {"*": "svd(rank=2, every=0, side=left)"}, lr=1e-2, rest_lr=1e-3)
        biases = {name: value.clone().requires_grad_() for name, value in start.items() if "bias" in name}
        coords, bases = {}, {}
        for name in start.keys() - biases.keys():
            coords[name] = torch.zeros(2, start[name].shape[1], dtype=torch.float64, requires_grad=True)
        by_hand = [
            torch.optim.AdamW(coords.values(), 1e-2, weight_decay=0),
            torch.optim.AdamW(biases.values(), 1e-3, weight_decay=0),
        ]

        def loss(weights, x):
            hidden = torch.tanh(x @ weights["0.weight"].T + weights["0.bias"])
            return (hidden @ weights["2.weight"].T + weights["2.bias"]).square().mean()

        for seed in range(6):
            x = inputs(seed)
            if not bases:
                matrices = {name: start[name].clone().requires_grad_() for name in coords}
                grads = torch.autograd.grad(loss({**start, **matrices}, x), list(matrices.values()))
                bases = {name: torch.linalg.svd(grad).U[:, :2] for name, grad in zip(matrices, grads, strict=True)}
            for one in by_hand:
                one.zero_grad()
            loss({**biases, **{name: start[name] + bases[name] @ z for name, z in coords.items()}}, x).backward()
            for one in by_hand:
                one.step()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        expected = {**biases, **{name: start[name] + bases[name] @ z for name, z in coords.items()}}
        assert gap(optimizer.weights(), {name: weight.detach() for name, weight in expected.items()}) <= TOLERANCE

    @pytest.mark.parametrize(
        "options",
        [
            {"base": "adamw"},
            {"base": "adamw", "moments": "8bit", "min_8bit_size": 2},
            {"base": "adamw", "layerwise": True},
            {"base": "adamw", "compat": "galore"},
            {"base": "muon"},
            {"base": "lion"},
            {"base": "sgd", "momentum": 0.9},
        ],
        ids=lambda options: "-".join(map(str, options.values())),
    )
    def test_a_step_of_what_trains_in_full_is_as_long_as_its_rate(self, mode, options):
        """The first update of any base is ``lr`` times a direction; muon's fallback is one of them."""
        before, moved, weights = dict(llama().named_parameters()), [], []
        for rest in (None, 1e-3):
            model = llama()
            optimizer = MODES[mode](model, SPEC, lr=1e-2, rest_lr=rest, **options)
            weights.append(
                trained(model, optimizer, steps=1, schedule=False) if "layerwise" not in options else once(model, optimizer)
            )
            names = [n for group in optimizer.param_groups if group["kind"] != "coords" for n in group["param_names"]]
            moved.append({name: weights[-1][name] - before[name] for name in names})
        assert names
        for name, change in moved[0].items():
            assert change.any()
            # what is left of a change that is rounded as a part of a weight of about 1, ten times as large
            torch.testing.assert_close(10 * moved[1][name], change, rtol=0, atol=1e-14)
        for name in weights[0].keys() - moved[0].keys():
            assert torch.equal(weights[0][name], weights[1][name]), name

    def test_decay_is_by_the_rate_of_each(self, mode):
        """A step without a gradient to follow: W <- (1 - lr wd) W, with the rate of each group."""
        model = llama()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer = MODES[mode](model, SPEC, "sgd", lr=0.1, rest_lr=0.02, weight_decay=0.5)
        (0.0 * text_loss(model, text_batches(1, micro=1)[0][0])).backward()
        optimizer.step()
        transformed = {sub.name for sub in optimizer.subspaces}
        for name, weight in optimizer.weights().items():
            factor = 0.95 if name in transformed else 0.99
            torch.testing.assert_close(weight, factor * before[name], rtol=1e-15, atol=0)

    def test_a_schedule_keeps_the_ratio(self, mode):
        optimizer = MODES[mode](model := llama(), SPEC, lr=1e-2, rest_lr=2e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step, micro_batches in enumerate(text_batches(4)):
            assert rates(optimizer) == pytest.approx(
                {"coords": 1e-2 / (1 + step), "matrices": 2e-3 / (1 + step), "vectors": 2e-3 / (1 + step)}, rel=1e-15
            )
            train(model, optimizer, [micro_batches], schedule=False)
            scheduler.step()

    def test_a_checkpoint_loads_into_a_run_with_another(self, mode):
        """The rates are in the groups: a run goes on with those that were saved, whatever it was made with."""
        first, second = llama(), llama()
        saving = MODES[mode](first, SPEC, lr=1e-2, rest_lr=2e-3)
        trained(first, saving, schedule=False)
        loading = MODES[mode](second, SPEC, lr=1e-2, rest_lr=0.5)
        second.load_state_dict(through_a_file(first.state_dict()))
        loading.load_state_dict(through_a_file(saving.state_dict()))
        assert rates(loading) == {"coords": 1e-2, "matrices": 2e-3, "vectors": 2e-3}
        weights = [trained(model, one, schedule=False) for model, one in ((first, saving), (second, loading))]
        assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def once(model, optimizer):
    """One step on one batch, where every backward is a step."""
    text_loss(model, text_batches(1, micro=1)[0][0]).backward()
    optimizer.step()
    return {name: weight.detach().clone() for name, weight in optimizer.weights().items()}


@pytest.mark.parametrize("rules", [SPEC, {"*embed*": "frozen", "*norm*": "frozen", "lm_head": "none", "*": SPEC}])
def test_the_modes_are_equal(rules):
    runs = three_ways(
        llama, rules, "adamw", text_batches(12), switches=(4, 9), clip=0.5, lr=1e-2, rest_lr=1e-3, weight_decay=0.1
    )
    for other in runs[1:]:
        assert gap(other, runs[0]) <= TOLERANCE
    start = dict(llama().named_parameters())
    still = {name for name, weight in runs[0].items() if torch.equal(weight, start[name])}
    assert still == {name for name in start if isinstance(rules, dict) and ("embed" in name or "norm" in name)}


class TestGroupsOfTheUser:
    def groups(self, *options):
        model = zoo()
        parts = [model.biased, model.conv, model.experts]
        return [
            {"params": [(f"{i}.{name}", param) for name, param in part.named_parameters()], **given}
            for i, (part, given) in enumerate(zip(parts, options, strict=False))
        ]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({}, (0.1, 0.01)),
            ({"lr": 0.5}, (0.5, 0.5)),  # a group's own rate is nearer than the run's
            ({"lr": 0.5, "rest_lr": 0.05}, (0.5, 0.05)),
            ({"rest_lr": 0.05}, (0.1, 0.05)),
            ({"rest_lr": None}, (0.1, 0.1)),
            ({"rest_lr": 0.0}, (0.1, 0.0)),
        ],
    )
    def test_their_rates(self, given, expected):
        optimizer = lingrad.wrap(self.groups(given, {}), "svd(rank=2)", lr=0.1, rest_lr=0.01)
        found = rates(optimizer)
        assert (found["0.coords"], found["0.vectors"]) == expected
        assert (found["1.coords"], found["1.vectors"]) == (0.1, 0.01)

    @pytest.mark.parametrize("value", [-1, "x", float("nan")])
    def test_a_value_that_is_no_rate(self, value):
        with pytest.raises(SpecError, match="rest_lr must be a number, 0 or more, not") as caught:
            lingrad.wrap(self.groups({"rest_lr": value}), "svd(rank=2)", lr=0.1)
        assert caught.value.option == "rest_lr"

    def test_one_of_which_nothing_trains_in_full(self):
        with pytest.raises(
            SpecError, match="'rest_lr' has no effect in a param group of which nothing trains in full"
        ) as caught:
            lingrad.wrap(self.groups({}, {}, {"rest_lr": 0.1}), "svd(rank=2)", lr=0.1)
        assert caught.value.option == "rest_lr"

    def test_one_of_which_nothing_trains(self):
        with pytest.raises(SpecError, match="'lr' has no effect in a param group of which nothing trains; leave it out"):
            lingrad.wrap(self.groups({}, {"rules": {"*": "frozen"}, "lr": 0.2}), "svd(rank=2)", lr=0.1)

    def test_a_rate_of_the_run_that_no_group_takes(self):
        own = {"lr": 0.5}
        with pytest.raises(
            SpecError, match="'rest_lr' has no effect where .* or only param groups do that have a learning rate"
        ):
            lingrad.wrap(self.groups(own, own), "svd(rank=2)", lr=0.1, rest_lr=0.01)

    def test_a_misspelt_one(self):
        with pytest.raises(SpecError, match="unknown option 'rest_lt' in a param group; did you mean 'rest_lr'"):
            lingrad.wrap(self.groups({"rest_lt": 0.1}), "svd(rank=2)", lr=0.1)


@each_mode
@pytest.mark.parametrize(("value", "shown"), [(-1, "-1"), ("x", "'x'"), (float("inf"), "inf"), (True, "True")])
def test_a_value_that_is_no_rate(mode, value, shown):
    with pytest.raises(SpecError) as caught:
        MODES[mode](llama(), SPEC, lr=0.1, rest_lr=value)
    assert str(caught.value) == f"rest_lr must be a number, 0 or more, not {shown}"
    assert caught.value.option == "rest_lr"


@each_mode
@pytest.mark.parametrize("rules", ["svd(rank=2)", {"*bias": "frozen", "*": "svd(rank=2)"}])
def test_refused_where_nothing_trains_in_full(mode, rules):
    model = nn.Sequential(nn.Linear(6, 4, bias=isinstance(rules, dict)))
    with pytest.raises(SpecError, match="'rest_lr' has no effect where nothing trains in full") as caught:
        MODES[mode](model, rules, lr=0.1, rest_lr=0.1)
    assert caught.value.option == "rest_lr"
    MODES[mode](model, rules, lr=0.1)  # and nothing was left behind


class TestTensors:
    def test_each_group_has_its_own(self):
        rest = torch.tensor(1e-3, dtype=torch.float64)
        optimizer = lingrad.wrap(llama(), SPEC, lr=torch.tensor(1e-2), rest_lr=rest)
        coords, matrices, vectors = (group["lr"] for group in optimizer.param_groups)
        matrices.mul_(2)
        assert (float(rest), float(vectors), float(matrices)) == (1e-3, 1e-3, 2e-3)
        assert float(coords) == pytest.approx(1e-2)

    @each_mode
    def test_they_train_as_numbers_do(self, mode):
        weights = []
        for kind in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
            model = llama()
            optimizer = MODES[mode](model, SPEC, lr=kind(1e-2), rest_lr=kind(1e-3), weight_decay=0.1)
            weights.append(trained(model, optimizer))
        assert gap(*weights) <= TOLERANCE

    @pytest.mark.parametrize(
        ("lr", "rest_lr", "option"),
        [(1e-2, 1e-3, "lr"), (torch.tensor(1e-2), 1e-3, "rest_lr"), (1e-2, torch.tensor(1e-3), "lr")],
    )
    @pytest.mark.parametrize("call", ["compile_step", "capture"])
    def test_a_compiled_or_captured_step_needs_both(self, lr, rest_lr, option, call):
        optimizer = lingrad.wrap(llama(), SPEC, lr=lr, rest_lr=rest_lr)
        with pytest.raises(SpecError, match=rf"make the optimizer with a tensor: {option}=torch.tensor\(1e-3") as caught:
            optimizer.compile_step() if call == "compile_step" else optimizer.capture(lambda: None)
        assert caught.value.option == option

    @pytest.mark.slow
    @each_mode
    def test_a_compiled_step(self, mode):
        weights = []
        for compiled in (False, True):
            torch._dynamo.reset()
            model = llama(torch.float32)
            optimizer = MODES[mode](model, SPEC, lr=torch.tensor(1e-2), rest_lr=torch.tensor(1e-3), weight_decay=0.1)
            if compiled:
                optimizer.compile_step(backend="aot_eager")
            weights.append(trained(model, optimizer))
        assert gap(*weights) <= 1e-5  # float32: the traced step divides and multiplies in another order
