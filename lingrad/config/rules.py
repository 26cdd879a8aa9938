"""Rules: a config string for all linear layers, or one for each glob over module names; ``none`` and ``frozen`` are words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Final, Literal

from lingrad.config import spec
from lingrad.config.methods import refuse_method
from lingrad.errors import SpecError, did_you_mean, shown
from lingrad.transforms import registry
from lingrad.transforms.base import Transform

_LONGEST = 2**20  # characters of rules in one string: some for each layer of the largest models
SpecLike = str | Transform


class Untrained(Enum):
    """What a rule says of parameters that are not trained; its one member is `FROZEN`."""

    FROZEN = "frozen"


FROZEN: Final = Untrained.FROZEN

# What a rule says of a parameter: it is transformed, not trained, or (None) trained in full.
Rule = Transform | Literal[Untrained.FROZEN] | None

Rules = SpecLike | Mapping[str, str | Rule]


def parse_rules(rules: Rules) -> Transform | dict[str, Rule]:
    """Read a config string, or rules.

    Args:
        rules: A transform, a config string, a mapping of globs to either, or the same as one string:
            ``"*.attn.*: svd(rank=64); *norm*: frozen; *: none"``.

    Returns:
        The transform, or globs with what they say: a transform, None (``none``: train in full), or `FROZEN` (``frozen``: do not
        train).

    Raises:
        SpecError: A config string is malformed or there are no rules.
    """
    if isinstance(rules, Transform):
        return rules
    if isinstance(rules, str) and len(rules) > _LONGEST:
        raise SpecError(f"rules have at most {_LONGEST:,} characters, and these have {len(rules):,}: {shown(rules)}")
    if isinstance(rules, str) and rules.strip():
        parts = [_outside_brackets(line, ":") for line in _outside_brackets(rules, ";\n") if line.strip()]
        if len(parts) == 1 and len(parts[0]) == 1:
            refuse_method(rules)
            return spec.parse(rules)
        for part in parts:
            if len(part) != 2:
                raise SpecError(
                    f"a rule is written 'glob: config string', and rules are separated by ';', not "
                    f"{shown(':'.join(part).strip())}"
                )
        globs = [glob.strip() for glob, _ in parts]
        for glob, count in Counter(globs).items():
            if count > 1:
                raise SpecError(f"rule '{glob}' is given twice; the first match wins, so keep one of them")
        rules = {glob: text.strip() for glob, (_, text) in zip(globs, parts, strict=True)}
    if not isinstance(rules, Mapping) or not rules:
        raise SpecError(
            f"expected a config string such as 'svd(rank=128)' or rules such as {{'*.attn.*': 'svd(rank=64)'}}, not "
            f"{shown(rules)}"
        )
    for glob in rules:
        if not isinstance(glob, str):
            raise SpecError(f"rules are globs over module names, such as '*.attn.*', not {shown(glob)}")
    return {glob: _rule_value(glob, value) for glob, value in rules.items()}


def _outside_brackets(text: str, separators: str) -> list[str]:
    """Split a text at the separators that are outside brackets; those inside belong to a config string."""
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char in separators and depth <= 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]]


def format_rule(rule: Rule) -> str:
    """A rule as text that `parse_rules` reads."""
    return "none" if rule is None else rule.value if rule is FROZEN else spec.format(rule)


def _rule_value(glob: str, value: str | Rule) -> Rule:
    if value is None or isinstance(value, Transform | Untrained):
        return value
    if isinstance(value, str):
        word = value.strip().lower()
        words = ("none", FROZEN.value)
        if word in words:
            return None if word == "none" else FROZEN
        near = did_you_mean(word, [*words, *registry.transform_names()])
        if any(f"'{one}'" in near for one in words) and word not in registry.transform_names():
            raise SpecError(f"rule '{glob}' says '{value}', which is no word{near}")
    try:
        refuse_method(value)
        return spec.parse(value)
    except SpecError as error:
        raise SpecError(f"rule '{glob}': {error}") from None
