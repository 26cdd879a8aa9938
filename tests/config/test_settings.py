"""The options of a run: the same everywhere, and a misspelt one is an error that names the right one."""

import inspect

import pytest
from torch import nn

import lingrad
from lingrad.config.settings import Settings
from lingrad.errors import SpecError

ONLY_WRAP = {"residual"}
ONLY_ADAPT = ("merge_every", "keep_remainder", "rounds")


def model():
    return nn.Sequential(nn.Linear(6, 4))


def options_of(function):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_wrap_and_adapt_take_every_option_with_the_same_default():
    every = {name: getattr(Settings(), name) for name in Settings.names()}
    assert options_of(lingrad.adapt) == {name: value for name, value in every.items() if name not in ONLY_WRAP}
    assert options_of(lingrad.wrap) == {name: value for name, value in every.items() if name not in ONLY_ADAPT}


@pytest.mark.parametrize("option", Settings.names())
@pytest.mark.parametrize("entry", [lingrad.wrap, lingrad.adapt], ids=["wrap", "adapt"])
def test_a_misspelt_option(entry, option):
    misspelt = option[:2] + option[3:]
    with pytest.raises(SpecError, match=f"takes no option '{misspelt}'; did you mean '{option}'"):
        entry(model(), "svd(rank=2)", lr=0.1, **{misspelt: True})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("carry", "rotat", "carry must be one of keep, reset, rotate, transport, not 'rotat'; did you mean 'rotate'?"),
        ("merge", "exakt", "merge must be one of auto, exact, fast, not 'exakt'; did you mean 'exact'?"),
        ("compat", "galor", "compat must be 'galore' or None, not 'galor'; did you mean 'galore'?"),
        ("share", "inputs", "share must be 'input' or None, not 'inputs'; did you mean 'input'?"),
        ("ledger", 1, "ledger must be True or False, not 1"),
        ("weight_decay", -1.0, "weight_decay must be a number, 0 or more, not -1.0"),
        ("weight_decay", "0.1", "weight_decay must be a number, 0 or more, not '0.1'"),
        ("scale", float("nan"), "scale must be a number, 0 or more, not nan"),
        ("scale", float("inf"), "scale must be a number, 0 or more, not inf"),
        ("seed", "abc", "seed must be a whole number, not 'abc'"),
        ("merge_every", 0, "merge_every must be a number of steps, 1 or more, or None, not 0"),
    ],
)
def test_a_value_that_no_option_has(option, value, message):
    with pytest.raises(SpecError) as caught:
        lingrad.adapt(model(), "svd(rank=2)", lr=0.1, **{option: value})
    assert str(caught.value) == message


def test_the_mode_is_chosen_by_the_function():
    with pytest.raises(SpecError, match="wrap trains in optimizer mode; call lingrad.adapt for adapter mode"):
        lingrad.wrap(model(), "svd(rank=2)", lr=0.1, mode="adapter")
    with pytest.raises(SpecError, match="adapt trains in adapter mode; call lingrad.wrap for optimizer mode"):
        lingrad.adapt(model(), "svd(rank=2)", lr=0.1, mode="optimizer")
