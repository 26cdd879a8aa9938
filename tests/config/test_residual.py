"""Rules for the part of a gradient that a basis drops, as strings; and what does not go with them."""

import re

import pytest

import lingrad
from lingrad.config.residual import Residual, parse_residual
from lingrad.errors import DualityError, ModeError, SpecError
from tests.support.models import llama, text_batches, train
from tests.support.runs import assert_equal_bits, weights_of

each_rule = pytest.mark.parametrize("rule", ["scaled", "sign", "feedback", "sampled"])


def trained(rule):
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=3, every=3)", lr=1e-2, residual=rule)
    train(model, optimizer, text_batches(1), schedule=False)
    return optimizer


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("fira", "residual must be one of scaled, sign, feedback, sampled, not 'fira'"),
        ("scale", "did you mean 'scaled'"),
        ("scaled(lim=2)", "has no option 'lim'; it takes limit"),
        ("feedback(factor=2)", "has no option 'factor'; it takes no options"),
        ("scaled(limit=0.5)", "limit of residual='scaled' must be a number, 1 or more, not 0.5"),
        ("sign(factor=-1)", "factor of residual='sign' must be a number, 0 or more, not -1"),
        ("sign(factor=high)", "must be a number, 0 or more, not 'high'"),
        ("sampled(p=0.1)", "has no option 'p'; it takes q"),
        ("sampled(q=0)", "q of residual='sampled' must be a number above 0, 1 at most, not 0"),
        ("sampled(q=1.5)", "must be a number above 0, 1 at most, not 1.5"),
        ("sampled(q=-0.1)", "must be a number above 0, 1 at most, not -0.1"),
        ("sampled(q=true)", "must be a number above 0, 1 at most, not True"),
        ("sampled(q=half)", "must be a number above 0, 1 at most, not 'half'"),
        ("sign(", "this is not a config string"),
        (3, "residual must be a word, not 3: expected scaled, sign, feedback or sampled"),
        ("scaled(1.1)", "residual='scaled(1.1)': expected scaled, sign, feedback or sampled"),
        ("", "residual='': expected scaled, sign, feedback or sampled"),
    ],
)
def test_a_rule_that_is_none(text, match):
    with pytest.raises(SpecError, match=re.escape(match)) as caught:
        lingrad.wrap(llama(), "svd(rank=3)", lr=1e-2, residual=text)
    assert caught.value.option == "residual"


@pytest.mark.parametrize(
    "text", ["scaled", "scaled(limit=1.5)", "sign", "sign(factor=0.5)", "feedback", "sampled", "sampled(q=0.25)"]
)
def test_strings_are_canonical(text):
    assert str(parse_residual(text)) == text
    assert parse_residual("scaled( limit = 1.01 )") == Residual("scaled")


@each_rule
def test_adapter_mode_switch_ledger_and_export(rule):
    with pytest.raises(SpecError, match="which no adapter holds, so that adapter mode has no such run"):
        lingrad.adapt(llama(), "svd(rank=3)", lr=1e-2, residual=rule)
    with pytest.raises(SpecError, match="has no low rank for the ledger to record"):
        lingrad.wrap(llama(), "svd(rank=3)", lr=1e-2, residual=rule, ledger=True)
    optimizer = trained(rule)
    before = weights_of(optimizer)
    with pytest.raises(SpecError, match="which no adapter holds"):
        optimizer.switch("adapter")
    assert optimizer.mode == "optimizer"
    with pytest.raises(ModeError, match="no thin factors hold"):
        optimizer.changes()
    assert_equal_bits(weights_of(optimizer), before)


def test_with_another_programs_arithmetic():
    with pytest.raises(SpecError, match="compat='galore' follows a program that drops the residual"):
        lingrad.wrap(llama(), "svd(rank=3)", lr=1e-2, residual="sign", compat="galore")


def test_where_nothing_is_transformed():
    with pytest.raises(SpecError, match="'residual' has no effect where nothing is transformed"):
        lingrad.wrap(llama(), {"*": "none"}, lr=1e-2, residual="scaled")


def test_feedback_must_know_the_mean_of_gradients():
    with pytest.raises(DualityError, match="residual='feedback' cannot follow the state 'exp_avg_sq_row' of base 'adafactor'"):
        lingrad.wrap(llama(), "svd(rank=3)", "adafactor", lr=1e-2, residual="feedback")
