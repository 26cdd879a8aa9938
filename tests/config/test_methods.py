"""Published methods by name: the run that a name makes is that of its parts, wherever rules are taken."""

import re

import pytest
import torch
from torch import nn

import lingrad
from lingrad import memory
from lingrad.config.methods import method_of, takes_methods
from lingrad.config.published import METHODS
from lingrad.config.rules import parse_rules
from lingrad.errors import DualityError, SpecError
from tests.support.models import llama, text_batches, train
from tests.support.runs import assert_equal_bits, weights_of

FEW_BITS = ("loqt", "q_galore")  # for weights in 4, 8 or 16 bits
ON_DENSE = [name for name in METHODS if name not in FEW_BITS]
SAMPLE = {"rank": 3, "every": 4, "after": 3}


def written(name):
    options = ", ".join(f"{key}={SAMPLE[key]}" for key in METHODS[name].options if key in SAMPLE)
    return f"{name}({options})"


def trained(rules, *base, make=lingrad.wrap, **options):
    model = llama(torch.float32)
    optimizer = make(model, rules, *base, lr=1e-2, **options)
    train(model, optimizer, text_batches(6, micro=1), schedule=False)
    return optimizer


@pytest.mark.parametrize("name", ON_DENSE)
def test_a_name_is_its_parts(name):
    chosen = method_of(written(name))
    named = trained(written(name))
    parts = trained(chosen.rules, chosen.base, **chosen.base_options, **chosen.settings)
    assert_equal_bits(weights_of(named), weights_of(parts))
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in one.state_dict()["param_groups"]]
        for one in (named, parts)
    ]
    assert groups[0] == groups[1]  # and a checkpoint of one is one of the other
    parts.load_state_dict(named.state_dict())


@pytest.mark.parametrize("name", ON_DENSE)
def test_adapter_mode_has_the_same_run_or_refuses(name):
    if "residual" in METHODS[name].settings:
        with pytest.raises(SpecError, match="which no adapter holds"):
            trained(written(name), make=lingrad.adapt)
        return
    adapted, wrapped = (weights_of(trained(written(name), make=make)) for make in (lingrad.adapt, lingrad.wrap))
    for key, weight in wrapped.items():
        torch.testing.assert_close(adapted[key], weight, rtol=0, atol=2e-3)  # float32, six steps of 1e-2


def test_q_galore_is_for_weights_that_are_rounded():
    message = (
        r"rounding='stochastic' is for weights in 16 or 8 bits[^\n]*\nMethod 'q_galore' sets rounding='stochastic'; another"
    )
    with pytest.raises(SpecError, match=message):
        trained(written("q_galore"))
    with pytest.raises(SpecError) as caught:  # which the user gave
        trained("galore(rank=3)", rounding="stochastic")
    assert "Method" not in str(caught.value)
    chosen = method_of("q_galore(rank=3, every=4)")
    found = []
    for rules, options in (("q_galore(rank=3, every=4)", {}), (chosen.rules, {**chosen.base_options, **chosen.settings})):
        model = llama(torch.bfloat16)
        optimizer = lingrad.wrap(model, rules, lr=1e-2, **options)
        train(model, optimizer, text_batches(6, micro=1), schedule=False)
        found.append(weights_of(optimizer))
    assert_equal_bits(*found)


def test_loqt_is_for_quantised_weights():
    with pytest.raises(SpecError, match="keep_remainder is for weights that are stored in 4 or 8 bits"):
        trained(written("loqt"), make=lingrad.adapt)


@takes_methods
def taken(model, rules, base="adamw", *, scale=1.0, carry="keep", residual=None, **options):
    """What a function that takes methods is given."""
    return rules, base, {"scale": scale, "carry": carry, "residual": residual, **options}


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("fira(rank=3)", {}, ("svd(rank=3)", "adamw", {"residual": "scaled", "scale": 1.0})),
        ("Fira( rank = 3 )", {}, ("svd(rank=3)", "adamw", {"residual": "scaled"})),
        ("galore-8bit(rank=3)", {}, ("svd(rank=3)", "adamw", {"scale": 0.25, "moments": "8bit"})),
        ("galore(rank=3, scale=1)", {}, ("svd(rank=3)", "adamw", {"scale": 1})),
        ("galore(rank=3)", {"scale": 0.5}, ("svd(rank=3)", "adamw", {"scale": 0.5})),
        ("galore(rank=3)", {"scale": 1.0}, ("svd(rank=3)", "adamw", {"scale": 1.0})),
        ("galore(rank=3, scale=2)", {"scale": 1.0}, ("svd(rank=3)", "adamw", {"scale": 1.0})),
        ("galore(rank=3, moments='8bit')", {}, ("svd(rank=3)", "adamw", {"scale": 0.25, "moments": "8bit"})),
        ("ldadam(rank=3, carry=rotate)", {}, ("power(rank=3, every=1)", "adamw", {"carry": "rotate", "betas": (0.908, 0.99)})),
        ("ldadam(rank=3)", {"carry": "keep"}, ("power(rank=3, every=1)", "adamw", {"carry": "keep", "residual": "feedback"})),
        ("ldadam(rank=3)", {"betas": (0.5, 0.6)}, ("power(rank=3, every=1)", "adamw", {"betas": (0.5, 0.6)})),
        ("ldadam(rank=3, base=adam)", {}, ("power(rank=3, every=1)", "adam", {"betas": (0.908, 0.99)})),
        ("ldadam(rank=3)", {"base": torch.optim.Adam}, ("power(rank=3, every=1)", torch.optim.Adam, {"betas": (0.908, 0.99)})),
        ("ldadam(rank=3, base=sgd(momentum=0.5))", {}, ("power(rank=3, every=1)", "sgd", {"betas": None, "momentum": 0.5})),
        ("flora(rank=3)", {}, ("random(rank=3)", "sgd", {"momentum": 0.9, "carry": "rotate"})),
        ("flora(rank=3)", {"base": "adamw"}, ("random(rank=3)", "adamw", {"momentum": None, "carry": "rotate"})),
        ("flora(rank=3, base=lion)", {"base": "adamw"}, ("random(rank=3)", "adamw", {"momentum": None})),
        ("fira(rank=3, side=both, every=7)", {}, ("svd(rank=3, every=7, side=both)", "adamw", {"residual": "scaled"})),
        ("fira(rank=3, residual=scaled(limit=1.1))", {}, ("svd(rank=3)", "adamw", {"residual": "scaled(limit=1.1)"})),
        ("fira(rank=3)", {"residual": None}, ("svd(rank=3)", "adamw", {"residual": None})),
        ("svd(rank=3)", {"lr": 1.0}, ("svd(rank=3)", "adamw", {"lr": 1.0})),
        ("svd(rank=3)", {"base": "sgd(momentum=0.5)"}, ("svd(rank=3)", "sgd", {"momentum": 0.5})),
        ("svd(rank=3)", {"base": "sgd(momentum=0.5)", "momentum": 0.1}, ("svd(rank=3)", "sgd", {"momentum": 0.1})),
        ("flora(rank=3)", {"base": "sgd(momentum=0.5)"}, ("random(rank=3)", "sgd", {"momentum": 0.5, "carry": "rotate"})),
    ],
)
def test_what_is_given_replaces_the_methods_own(text, given, expected):
    for rules, base, options in (taken(None, text, **given), taken(None, rules=text, **given)):
        assert (rules, base) == expected[:2]
        assert {key: options.get(key) for key in expected[2]} == expected[2]


@pytest.mark.parametrize("rules", [{"*": "svd(rank=3)"}, "*: svd(rank=3)", lambda model: None, None])
def test_rules_that_name_no_method_stay(rules):
    assert taken(None, rules, "sgd")[:2] == (rules, "sgd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("galore", r"method 'galore' needs rank, as in galore\(rank=...\)"),
        ("galore()", r"method 'galore' needs rank"),
        ("galore(rnk=3)", "method 'galore' has no option 'rnk'; did you mean 'rank'"),
        ("galore(rank=3, every=-1)", "every must be"),
        ("galore(3)", "expected a word, or one with options"),
        ("fira(rank=3, residual=scale)", "did you mean 'scaled'"),
        ("galor(rank=3)", "unknown transform or method 'galor'; did you mean 'galore'"),
        ("fria(rank=3)", "unknown transform or method 'fria'; did you mean 'fira'"),
        ("svdd(rank=3)", "unknown transform 'svdd'; did you mean 'svd'"),
    ],
)
def test_a_name_that_is_wrong(text, message):
    with pytest.raises(SpecError, match=message):
        trained(text)


@pytest.mark.parametrize("rules", ["*proj*: galore(rank=3); *: none", {"*proj*": "galore(rank=3)"}])
def test_a_name_for_some_weights_is_refused(rules):
    """Its options are the whole run's."""
    with pytest.raises(
        SpecError, match=r"is a method, which sets options of the whole run.*\"svd\(rank=3\)\", \"adamw\", scale=0.25"
    ):
        trained(rules)
    groups = [{"params": list(llama().named_parameters()), "rules": "galore(rank=3)"}]
    with pytest.raises(SpecError, match="is a method"):
        lingrad.wrap(groups, "svd(rank=3)", lr=1e-2)


def test_parameters_alone_take_a_name():
    chosen = list(nn.Linear(6, 5, bias=False).named_parameters())
    assert lingrad.wrap(chosen, "fira(rank=2)", lr=1e-2).settings.residual == "scaled"


def test_a_base_that_the_method_cannot_have():
    with pytest.raises(DualityError, match="carry='transport' cannot transport the state"):
        trained("ldadam(rank=3, base=adafactor)")


@pytest.mark.parametrize("name", ON_DENSE)
def test_memory_and_explain_take_names(name):
    chosen = method_of(written(name))
    with torch.device("meta"):
        model = llama(torch.float32)
    long = memory.estimate(model, chosen.rules, chosen.base, lr=1e-3, **chosen.base_options, **chosen.settings)
    assert memory.estimate(model, written(name), lr=1e-3) == long
    lines = [lingrad.explain(model, rules).lines for rules in (written(name), chosen.rules)]
    rule = chosen.settings.get("residual")
    if rule is not None:  # which reads the gradient itself at every step, or at those that draw a weight
        sampled = rule.startswith("sampled")
        transformed = {line.gradient for line in lines[0] if line.coords != "-"}
        assert transformed == {"sampled" if sampled else "full"}
    else:
        assert lines[0] == lines[1]
    assert parse_rules(chosen.rules) == parse_rules(lingrad.config.methods.long_rules(written(name)))


def test_the_docs_have_the_table():
    from pathlib import Path

    from lingrad.memory import named

    page = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    assert f"<!-- methods:begin -->\n{named.table()}\n<!-- methods:end -->" in page
    assert all(re.search(rf"`{name}\(", page) for name in METHODS)


def test_a_method_takes_all_options_of_its_transform():
    assert method_of("galore(rank=3, clip=true, solver=gram)").rules == "svd(rank=3, clip=true, solver=gram)"
    assert "clip=true" in method_of("q_galore(rank=3, clip=true)").rules
    with pytest.raises(SpecError, match="method 'galore' has no option 'rnk'; did you mean 'rank'"):
        method_of("galore(rnk=3)")


@pytest.mark.parametrize("make", [lingrad.wrap, lingrad.adapt])
def test_without_rules_it_is_finetune(make):
    model = llama(torch.float32)
    optimizer, named = make(model, lr=1e-3), make(llama(torch.float32), "finetune(rank=32)", lr=1e-3)
    assert [str(sub) for sub in optimizer.subspaces] == [str(sub) for sub in named.subspaces]
    assert [group["scale"] for group in optimizer.param_groups if group["kind"] == "coords"] == [
        group["scale"] for group in named.param_groups if group["kind"] == "coords"
    ]
