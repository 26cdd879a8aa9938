"""Weights that are shared, oddly shaped, frozen, or never reached."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from lingrad.errors import SpecError
from lingrad.testing.training import TOKENS, every_kind
from tests.support.cases import ALL_SPECS
from tests.support.models import gap, three_ways, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode
from tests.support.small import EVERYTHING, EXACT, inputs, named, squared, stack, teach

pytestmark = pytest.mark.thinned(3)


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, 12)
        self.middle = nn.Linear(12, 12)
        self.head = nn.Linear(12, TOKENS)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids).mean(1)).tanh())


class SharedLinears(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, 12)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, TOKENS)

    def forward(self, ids):
        return self.head(self.second(self.first(self.embed(ids).mean(1)).tanh()).tanh())


class TwoParents(nn.Module):
    """One module under two parents: no tied weight, but a layer that is called twice and found twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, 12)
        self.first = nn.Linear(12, 12)
        self.block = nn.Sequential(nn.Tanh(), self.first)
        self.head = nn.Linear(12, TOKENS)

    def forward(self, ids):
        return self.head(self.block(self.first(self.embed(ids).mean(1))).tanh())


class TestShared:
    @each_mode
    @pytest.mark.parametrize("build", [TiedLanguageModel, SharedLinears, TwoParents])
    def test_a_shared_weight_trains_as_in_plain_torch(self, mode, build):
        plain, model = build().double(), build().double()
        teach(plain, torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1), zoo_batches(6))
        optimizer = MODES[mode](model, {"*": "full()"}, lr=0.01, weight_decay=0.1)
        shared = {TiedLanguageModel: "embed.weight", SharedLinears: "first.weight", TwoParents: "first.weight"}[build]
        assert [sub.name for sub in optimizer.subspaces].count(shared) == 1
        teach(model, optimizer, zoo_batches(6))
        optimizer.detach()
        assert gap(named(model), named(plain)) <= EXACT
        assert list(model.state_dict()) == list(plain.state_dict())
        if build is TiedLanguageModel:
            assert model.head.weight is model.embed.weight
        elif build is SharedLinears:
            assert model.second.weight is model.first.weight
        else:
            assert model.block[1] is model.first

    @pytest.mark.parametrize("build", [TiedLanguageModel, SharedLinears, TwoParents])
    def test_its_modes_agree(self, build):
        runs = three_ways(
            lambda: build().double(),
            {"*": "svd(rank=3, every=3)"},
            "adamw",
            zoo_batches(10),
            zoo_loss,
            switches=(3, 7),
            lr=0.01,
            weight_decay=0.1,
        )
        assert max(gap(run, runs[0]) for run in runs[1:]) <= EXACT

    @each_mode
    def test_the_first_rule_wins_for_a_weight_that_two_reach_by_two_names(self, mode):
        for rules, rank in (({"head": "svd(rank=2)", "embed": None, "*": "svd(rank=5)"}, 2), ({"embed": "svd(rank=4)"}, 4)):
            model = TiedLanguageModel().double()
            if len(rules) == 3:
                with pytest.raises(SpecError, match="rule 'embed' is never reached"):
                    MODES[mode](model, rules, lr=0.01)
                del rules["embed"]
            optimizer = MODES[mode](model, rules, lr=0.01)
            teach(model, optimizer, zoo_batches(2))
            (sub,) = [s for s in optimizer.subspaces if s.name == "embed.weight"]
            assert sub.basis.transform.rank == rank
            assert tuple(sub.coords.shape) == (TOKENS, rank)
            if "*" in rules:
                assert {s.name: s.basis.transform.rank for s in optimizer.subspaces} == {
                    "embed.weight": 2,
                    "middle.weight": 5,
                }


class TestZeroSteps:
    @each_mode
    @pytest.mark.parametrize("spec_", ALL_SPECS)
    def test_a_state_of_no_step_starts_the_same_run(self, mode, spec_):
        weights = []
        saved = None
        for _ in range(2):
            model = every_kind()
            optimizer = MODES[mode](model, {"*": spec_}, lr=0.01)
            if saved is None:
                file = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            else:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            teach(model, optimizer, zoo_batches(4))
            weights.append(optimizer.weights())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    @each_mode
    @pytest.mark.parametrize("spec_", ALL_SPECS)
    def test_a_state_of_no_step_starts_a_run_over(self, mode, spec_):
        """Loaded into an optimizer that has run, over a model that is as it was."""
        fresh = every_kind()
        first = MODES[mode](fresh, {"*": spec_}, lr=0.01)
        saved = copy.deepcopy((fresh.state_dict(), first.state_dict()))
        teach(fresh, first, zoo_batches(4))
        model = every_kind()
        optimizer = MODES[mode](model, {"*": spec_}, lr=0.01)
        teach(model, optimizer, zoo_batches(3, seed=7))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        teach(model, optimizer, zoo_batches(4))
        assert all(torch.equal(optimizer.weights()[name], w) for name, w in first.weights().items())

    @each_mode
    @pytest.mark.parametrize("spec_", ALL_SPECS)
    def test_detaching_at_once_changes_nothing(self, mode, spec_):
        plain, model = every_kind(), every_kind()
        optimizer = MODES[mode](model, {"*": spec_}, lr=0.01)
        weights = optimizer.weights()
        optimizer.zero_grad()
        optimizer.detach()
        assert list(model.state_dict()) == list(plain.state_dict())
        for name, param in plain.named_parameters():
            assert torch.equal(named(model)[name], param)
            assert torch.equal(weights[name], param)


SHAPES = [(1, 7), (7, 1), (1, 1), (5, 3), (3, 5), (4, 4)]


class TestShapes:
    @each_mode
    @pytest.mark.parametrize(
        ("solver", "side"), [*(("exact", s) for s in ("short", "long", "left", "right", "both")), ("randomized", "short")]
    )
    @pytest.mark.parametrize("shape", SHAPES)
    def test_at_the_largest_rank_and_a_refresh_in_every_step_sgd_is_plain_sgd(self, mode, side, shape, solver):
        """Singular vectors at rank min(m, n) span all of the gradient they come from, whichever side has the basis; those of a
        sketch serve the next gradient, which they span where they are all there are."""
        m, n = shape
        runs = []
        for wrapped in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(n, m)).double()
            if wrapped:
                text = f"svd(rank={min(m, n)}, every=1, side={side}, solver={solver})"
                optimizer = MODES[mode](model, text, "sgd", lr=0.05)
            else:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for step in range(4):
                optimizer.zero_grad()
                squared(model, inputs(step, n)).backward()
                optimizer.step()
            runs.append(optimizer.weights() if wrapped else named(model))
        assert optimizer.subspaces[0].basis.refreshes == 4
        assert gap(runs[1], runs[0]) <= EXACT

    @pytest.mark.parametrize("every", [0, 1])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("name", ["svd", "power", "random", "pca", "kron"])
    def test_the_modes_agree_on_thin_weights(self, name, shape, every):
        m, n = shape

        def build():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(n, m), nn.Tanh(), nn.Linear(m, n)).double()

        one = f"(rank=1, every={every})"
        text = f"kron(left=power{one}, right=svd{one})" if name == "kron" else name + one
        batches = [[inputs(2 * step, n), inputs(2 * step + 1, n)] for step in range(6)]
        options = {"lr": 0.01, "weight_decay": 0.1}
        runs = three_ways(build, text, "adamw", batches, squared, switches=(2, 4), **options)
        assert max(gap(run, runs[0]) for run in runs[1:]) <= EXACT
        start = named(build())
        assert all(not torch.equal(runs[0][key], start[key]) for key in start)

    @each_mode
    @pytest.mark.parametrize(("every", "refreshes"), [(0, 1), (1, 4)])
    def test_how_often_a_basis_changes(self, mode, every, refreshes):
        for name in ("svd", "power", "pca"):
            model = stack()
            optimizer = MODES[mode](model, f"{name}(rank=2, every={every})", lr=0.05)
            (sub, *_) = optimizer.subspaces
            seen = []
            for step in range(4):
                optimizer.zero_grad()
                squared(model, inputs(step)).backward()
                optimizer.step()
                seen.append(sub.map().tensors[0].clone())
            assert sub.basis.refreshes == refreshes
            assert all(torch.equal(a, b) == (every == 0) for a, b in itertools.pairwise(seen))


class TestFreezing:
    LAYERS = ("embed", "conv", "experts", "middle", "biased")

    def run(self, model, optimizer, layer, frozen):
        for step, batch in enumerate(zoo_batches(7)):
            getattr(model, layer).requires_grad_(step not in frozen)
            optimizer.zero_grad()
            for ids in batch:
                zoo_loss(model, ids).backward()
            optimizer.step()

    @each_mode
    @pytest.mark.parametrize("layer", LAYERS)
    def test_a_layer_frozen_for_some_steps_is_skipped_by_them(self, mode, layer):
        plain, model = every_kind(), every_kind()
        stock = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = MODES[mode](model, {"*": "full()"}, lr=0.01, weight_decay=0.1)
        self.run(plain, stock, layer, (2, 3))
        self.run(model, optimizer, layer, (2, 3))
        assert gap(optimizer.weights(), named(plain)) <= EXACT
        optimizer.detach()
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("layer", LAYERS)
    @pytest.mark.parametrize("frozen", [(0, 1), (2,), (3,), (2, 3, 4)])
    def test_the_modes_agree_over_it(self, layer, frozen):
        """Frozen in the first steps, on a refresh step, off one, over two refreshes."""
        weights, refreshes = [], []
        for make in MODES.values():
            model = every_kind()
            optimizer = make(model, EVERYTHING, lr=0.01, weight_decay=0.1)
            self.run(model, optimizer, layer, frozen)
            (sub,) = [s for s in optimizer.subspaces if s.name.startswith(layer)]
            refreshes.append(sub.basis.refreshes)
            weights.append(optimizer.weights())
        assert gap(*weights) <= EXACT
        # due in steps 0, 2, 4, 6; the first is made up for as soon as there is a gradient, even if another follows
        missed = {(0, 1): 1, (2,): 1, (3,): 0, (2, 3, 4): 2}[frozen]
        assert refreshes == [4 - missed] * 2

    @each_mode
    def test_a_layer_detached_while_frozen_stays_frozen(self, mode):
        model = every_kind()
        optimizer = MODES[mode](model, EVERYTHING, lr=0.01)
        teach(model, optimizer, zoo_batches(2))
        for layer in (model.conv, model.biased):
            layer.requires_grad_(False)
        optimizer.detach()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"conv.weight", "conv.bias", "biased.weight", "biased.bias"}
