"""What a rule freezes: it does not train while the run is attached, and is as it was before and after."""

import warnings

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import CheckpointError, ModeError, SpecError
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo
from tests.support.runs import MODES, assert_equal_bits, each_mode, through_a_file, weights_of

SPEC = "svd(rank=4, every=3)"
RULES = {"*embed*": "frozen", "*norm*": "frozen", "lm_head": "none", "*": SPEC}
FROZEN = {name for name, _ in llama().named_parameters() if "embed" in name or "norm" in name}


def requires(model):
    return {name: param.requires_grad for name, param in model.named_parameters() if "lingrad" not in name}


def by_hand(model):
    for name, param in model.named_parameters():
        param.requires_grad_(name not in FROZEN)
    return model


@each_mode
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_run_is_that_of_a_model_frozen_by_hand(mode, layerwise):
    batches, runs = text_batches(7, micro=1), []
    for model, rules in ((llama(), RULES), (by_hand(llama()), {"lm_head": "none", "*": SPEC})):
        optimizer = MODES[mode](model, rules, lr=1e-2, weight_decay=0.1, layerwise=layerwise)
        train(model, optimizer, batches, switches=(4,))
        assert all(model.get_parameter(name).grad is None for name in FROZEN)
        assert not FROZEN & {name for group in optimizer.param_groups for name in group["param_names"]}
        optimizer.detach()
        runs.append(dict(model.named_parameters()))
    assert_equal_bits(*runs)
    start = dict(llama().named_parameters())
    assert {name for name, weight in runs[0].items() if torch.equal(weight, start[name])} == FROZEN


@each_mode
def test_full_rank_is_adamw_on_the_rest(mode):
    plain, model = by_hand(llama()), llama()
    batches = text_batches(10)
    train(plain, torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1), batches)
    optimizer = MODES[mode](model, {**RULES, "*": "full()"}, lr=1e-2, weight_decay=0.1)
    train(model, optimizer, batches)
    # the bound of the duality: the same arithmetic in another order
    assert gap(optimizer.weights(), {n: p for n, p in plain.named_parameters() if p.requires_grad}) <= 1e-12


class TestRequiresGrad:
    @each_mode
    def test_it_is_off_while_attached_and_given_back(self, mode):
        model = llama()
        model.model.norm.requires_grad_(False)  # the user's own stays off
        before = requires(model)
        optimizer = MODES[mode](model, RULES, lr=1e-2)
        assert not any(model.get_parameter(name).requires_grad for name in FROZEN)
        optimizer.switch("adapter" if mode == "optimizer" else "optimizer")
        assert not any(model.get_parameter(name).requires_grad for name in FROZEN)
        optimizer.detach()
        assert requires(model) == before
        assert before["model.norm.weight"] is False
        model.model.embed_tokens.requires_grad_(False)
        optimizer.detach()  # does nothing
        assert model.model.embed_tokens.weight.requires_grad is False

    @each_mode
    def test_of_a_parameter_that_was_replaced_meanwhile(self, mode):
        """load_state_dict with assign=True puts another parameter in its place, as frozen as the one before."""
        model = llama()
        optimizer = MODES[mode](model, RULES, lr=1e-2)
        embed = model.model.embed_tokens
        embed.load_state_dict({"weight": torch.ones_like(embed.weight)}, assign=True)
        assert not embed.weight.requires_grad
        optimizer.detach()
        assert embed.weight.requires_grad

    def test_a_switch_leaves_alone_what_was_unfrozen_meanwhile(self):
        """Another optimizer may train it by then."""
        model = llama()
        optimizer = lingrad.wrap(model, RULES, lr=1e-2)
        model.model.embed_tokens.requires_grad_(True)
        optimizer.switch("adapter")
        assert model.model.embed_tokens.weight.requires_grad

    @each_mode
    def test_a_tied_weight_is_frozen_by_either_name(self, mode):
        for glob in ("lm_head", "*embed_tokens"):
            model = llama(tie_word_embeddings=True)
            optimizer = MODES[mode](model, {glob: "frozen", "*": SPEC}, lr=1e-2)
            assert not model.lm_head.weight.requires_grad
            assert "model.embed_tokens.weight" not in optimizer.weights()


class TestAllOrNothing:
    """A call that fails has frozen nothing."""

    def test_a_model_that_a_mode_does_not_support(self):
        model = zoo()
        with pytest.raises(ModeError, match="pass the model itself"):
            lingrad.adapt(model.named_parameters(), {"head*": "frozen", "*": "svd(rank=1)"}, lr=0.1)
        assert all(requires(model).values())

    @each_mode
    @pytest.mark.parametrize("options", [{"rest_lr": -1.0}, {"betass": 0}, {"merge": "exakt"}])
    def test_a_wrong_option(self, mode, options):
        model = llama()
        with pytest.raises(SpecError):
            MODES[mode](model, RULES, lr=1e-2, **options)
        assert all(requires(model).values())

    @each_mode
    def test_an_error_after_the_layers_were_attached(self, mode, monkeypatch):
        def fail(run):
            raise RuntimeError("no memory left")

        monkeypatch.setattr("lingrad.engine.build.schedule", fail)
        model = llama()
        with pytest.raises(RuntimeError, match="no memory left"):
            MODES[mode](model, RULES, lr=1e-2)
        assert all(model.get_parameter(name).requires_grad for name in FROZEN)


@each_mode
def test_a_checkpoint_of_other_trained_parameters_is_refused(mode):
    model = llama()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    train(model, optimizer, text_batches(4), schedule=False)
    saved, expected = through_a_file(optimizer.state_dict()), weights_of(optimizer)
    state = through_a_file(model.state_dict())
    for rules, message in (
        ({**RULES, "*norm*": "none"}, "param groups"),
        ({**RULES, "*embed*": "none", "lm_head": "frozen"}, "parameter 'lm_head.weight'.*'model.embed_tokens.weight'"),
        ({"*.q_proj": "frozen", **RULES}, "group 'coords': the checkpoint has 14 params, this run has 12"),
    ):
        other = MODES[mode](llama(), rules, lr=1e-2)
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(saved)
    fresh = llama()
    same = MODES[mode](fresh, RULES, lr=1e-2)
    fresh.load_state_dict(state)
    same.load_state_dict(saved)
    assert_equal_bits(weights_of(same), expected)
    for one, run in ((model, optimizer), (fresh, same)):
        train(one, run, text_batches(3, seed=5), schedule=False)
    assert_equal_bits(weights_of(same), weights_of(optimizer))


class TestNamedParameters:
    def test_they_are_frozen_too(self):
        model = zoo()
        rules = {"embed*": "frozen", "*bias": "frozen", "head*": "none", "*": "svd(rank=2)"}
        optimizer = lingrad.wrap(model.named_parameters(), rules, lr=0.1)
        off = {name for name, on in requires(model).items() if not on}
        assert off == {name for name in requires(model) if "embed" in name or name.endswith("bias")}
        assert len(off) > 2
        assert off.isdisjoint(optimizer.weights())
        optimizer.detach()
        assert all(requires(model).values())

    def test_a_group_may_be_frozen_as_a_whole(self):
        model = zoo()
        groups = [
            {"params": [("head.weight", model.head.weight)], "rules": {"*": "frozen"}},
            {"params": [("biased.weight", model.biased.weight)]},
        ]
        optimizer = lingrad.wrap(groups, "svd(rank=2)", lr=0.1)
        assert [group["name"] for group in optimizer.param_groups] == ["1.coords"]
        assert not model.head.weight.requires_grad

    def test_nothing_to_train(self):
        model = zoo()
        with pytest.raises(SpecError, match="nothing to train: no parameter .* requires a gradient and that no rule freezes"):
            lingrad.wrap(model.named_parameters(), {"*": "frozen"}, lr=0.1)
        assert all(requires(model).values())


@each_mode
def test_unfreezing_it_in_mid_run_is_said_to_train_nothing(mode):
    model = llama()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    train(model, optimizer, text_batches(1), schedule=False)
    model.model.embed_tokens.requires_grad_(True)
    text_loss(model, text_batches(1)[0][0]).backward()
    with pytest.warns(
        UserWarning, match="model.embed_tokens.weight was frozen .* not trained.* without a rule that freezes it"
    ):
        optimizer.step()


@each_mode
def test_it_is_not_said_that_most_is_stepped_in_full(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 40, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MODES[mode](model, {"1": "frozen", "0": "svd(rank=2)"}, lr=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_weight_in_4_or_8_bits_stays_as_it_is(kind):
    """Its codes never require a gradient: frozen, it is not transformed, and its bias does not train."""
    packed = pytest.importorskip("tests.support.packed")
    model = packed.net(kind)
    optimizer = lingrad.adapt(model, {"0": "frozen", "2": "svd(rank=2, every=2)", "*": "none"}, lr=1e-2)
    codes, bias = model[0].weight.data.clone(), model[0].bias.detach().clone()
    assert [sub.name for sub in optimizer.subspaces] == ["2.weight"]
    packed.go(model, optimizer, packed.batches(3))
    assert torch.equal(model[0].weight.data, codes)
    assert torch.equal(model[0].bias, bias)
    assert not model[0].bias.requires_grad
    optimizer.detach()
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)
