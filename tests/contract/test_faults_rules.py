"""Senseless rules and config strings, drawn at random: nothing but lingrad's own errors escapes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingrad.config import spec
from lingrad.config.rules import format_rule, parse_rules
from lingrad.config.targets import resolve_model
from lingrad.errors import ShapeError, SpecError
from lingrad.testing.training import every_kind
from lingrad.transforms import Transform
from tests.support.cases import ALL_SPECS

NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "2.5",
    "1e-3",
    "1e999",
    "1" + "0" * 400,
    "0x" + "f" * 5000,
    "9" * 5000,
    "none",
    "true",
    "x",
    "''",
]

OPTIONS = [
    "rank",
    "every",
    "side",
    "clip",
    "solver",
    "iters",
    "lam",
    "lr",
    "optimizer",
    "kind",
    "store",
    "left",
    "right",
    "rnak",
]

WORDS = [*NUMBERS, "left", "both", "long", "exact", "randomized", "rows", "adam", "sgd(momentum=0.9)", "(1, 2)", "svd(rank=1)"]

names = st.sampled_from(["svd", "power", "random", "pca", "kron", "full", "swd", ""])

options = st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(WORDS)), max_size=4)

invalid = st.builds(lambda name, given: f"{name}({', '.join(f'{k}={v}' for k, v in given)})", names, options)

valid = st.sampled_from(
    [*ALL_SPECS, "none", "None", "frozen", "pca(rank=2, lam=1, optimizer=sgd(momentum=0.5))", "svd(rank=99, clip=true)"]
)

specs = valid | invalid | st.text(max_size=12)

NAMES = ["embed", "conv", "experts.gate_up_proj", "middle.weight", "biased", "biased.bias", "head", ""]

known_globs = st.builds(
    lambda name, cut, end: name[:cut] + end,
    st.sampled_from(NAMES),
    st.integers(0, 20),
    st.sampled_from(["", "*", "?", "[a-z]*"]),
)

globs = known_globs | st.text(alphabet="abdeimv.*?[]!-\\^$(){}|+é\0", max_size=8) | st.text(max_size=4)

rule_strings = st.builds(
    lambda pairs, by: by.join(f"{g}: {s}" for g, s in pairs),
    st.lists(st.tuples(globs, specs), max_size=3),
    st.sampled_from([";", "; ", "\n", ","]),
)


class TestRules:
    MODEL = every_kind()

    @given(st.dictionaries(globs, specs | st.none() | st.integers(), max_size=3) | rule_strings | specs)
    @settings(deadline=None, max_examples=400)
    def test_nothing_but_lingrad_s_errors_escapes(self, rules):
        try:
            plan = resolve_model(self.MODEL, rules)
        except (SpecError, ShapeError):
            return
        known = {name for name, _ in self.MODEL.named_parameters()}
        untransformed = [name for name, _ in (*plan.full, *plan.frozen)]
        assert {target.name for target in plan.targets} | {*untransformed} == known
        assert len(plan.targets) + len(untransformed) == len(known)
        parsed = parse_rules(rules)
        for transform in parsed.values() if isinstance(parsed, dict) else [parsed]:
            if isinstance(transform, Transform):
                text = spec.format(transform)
                assert spec.parse(text) == transform
                assert spec.format(spec.parse(text)) == text

    @given(
        st.dictionaries(st.sampled_from(["embed", "conv", "experts", "middle", "biased", "head"]), valid, min_size=1).filter(
            lambda rules: {*rules.values()} != {"frozen"}
        )
    )
    @settings(deadline=None, max_examples=50)
    def test_valid_rules_mean_the_same_written_out(self, rules):
        parsed = parse_rules(rules)
        written = {glob: format_rule(rule) for glob, rule in parsed.items()}
        assert parse_rules(written) == parsed
        assert parse_rules("; ".join(f"{glob}: {text}" for glob, text in written.items())) == parsed
        plans = [resolve_model(self.MODEL, given) for given in (rules, written)]
        assert [(t.name, t.transform) for t in plans[0].targets] == [(t.name, t.transform) for t in plans[1].targets]
        assert [name for name, _ in plans[0].frozen] == [name for name, _ in plans[1].frozen]

    @pytest.mark.parametrize(
        "text",
        [
            "svd(rank=0x" + "f" * 5000 + ")",  # more digits than Python prints
            "svd(rank=1, every=0x" + "f" * 5000 + ")",
            "pca(rank=1, lr=1" + "0" * 400 + ")",  # more than a float holds
            "pca(rank=1, lam=1e999)",
            "pca(rank=1, lr=1e999)",
            "pca(rank=1, optimizer=adam(eps=1e999))",
        ],
        ids=["rank", "every", "whole number", "lam", "lr", "optimizer"],
    )
    def test_numbers_beyond_all_use(self, text):
        """Refused in words, or kept so that a checkpoint can be read back; a transform must survive being written."""
        try:
            plan = resolve_model(self.MODEL, {"*": text})
        except (SpecError, ShapeError):
            return
        for target in plan.targets:
            assert spec.parse(spec.format(target.transform)) == target.transform
