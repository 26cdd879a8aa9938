"""The lines of the exactness contract: what breaks the duality does break it, and is refused where it can be seen."""

import pytest
import torch

import lingrad
from lingrad.errors import DualityError, LingradError
from tests.support import breakers
from tests.support.models import zoo


def test_what_is_refused_or_documented_does_part_the_modes():
    """Were one of these below 1e-9, its refusal would be for nothing."""
    found = dict(breakers.measure())
    assert {what: gap for what, gap in found.items() if gap < 1e-9 and "unaligned" not in what} == {}


@pytest.mark.parametrize("make", [lingrad.wrap, lingrad.adapt])
@pytest.mark.parametrize(
    ("base", "options", "remedy"),
    [
        (breakers.decaying, {}, "weight decay is the engine's: weight_decay=..."),
        ("adafactor", {"scale_parameter": True}, "Switch that off in the base"),
        (breakers.TrustRatio, {}, "or choose another base"),
        (torch.optim.ASGD, {}, "or choose another base"),
    ],
)
def test_bases_that_read_the_parameter_are_refused_with_cause_and_remedy(make, base, options, remedy):
    with pytest.raises(DualityError) as caught:
        make(zoo(), breakers.RULES, base, lr=1e-2, **options)
    assert "reads the parameter, not only its gradient" in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("base", ["adafactor", "adamw8bit"])
def test_moments_that_cannot_rotate_are_refused_with_cause_and_remedy(base):
    with pytest.raises(DualityError, match=r"quantised, factored or not a moment.*use carry='keep' or carry='reset'"):
        lingrad.adapt(zoo(), breakers.RULES, base, carry="rotate")


@pytest.mark.parametrize("method", ["fira(rank=1)", "frugal(rank=1)", "ldadam(rank=1)"])
def test_methods_without_a_linear_dual_are_refused_in_adapter_mode(method):
    with pytest.raises(LingradError, match="steps outside of the span of the basis, which no adapter holds"):
        lingrad.adapt(zoo(), method, lr=1e-2)
    assert lingrad.wrap(zoo(), method, lr=1e-2).mode == "optimizer"


def test_a_method_that_is_not_offered():
    with pytest.raises(LingradError, match="unknown transform"):
        lingrad.wrap(zoo(), {"*": "apollo(rank=4)"})


def test_a_dropout_of_adapters_is_not_offered():
    with pytest.raises(LingradError, match="base 'adamw' takes no option 'dropout'"):
        lingrad.adapt(zoo(), breakers.RULES, dropout=0.1)
