"""Which rule takes a parameter: globs over the names of parameters and of the modules that own them, the first match wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from lingrad.config.rules import FROZEN, Rule
from lingrad.errors import SpecError
from lingrad.transforms.base import Transform
from lingrad.weights.layout import fused_experts, is_packed


@dataclass
class Candidate:
    """A parameter that can be trained, all its names, the modules that own it, and whether a rule says what happens to it."""

    names: list[str]
    param: nn.Parameter
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    ruled: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether it contains codes of 4 or 8 bits."""
        return any(is_packed(module) and attribute == "weight" for module, attribute in self.owners)

    @property
    def experts(self) -> int:
        """How many experts it fuses; 0 if none."""
        return fused_experts(self.param, self.owners[0][0], self.names[0]) if self.owners else 0

    def known_as(self) -> set[str]:
        """Names a rule may match: of the parameter and of the modules that own it."""
        return {*self.names, *(name.rpartition(".")[0] for name in self.names)}


def match(candidates: list[Candidate], rules: Mapping[str, Rule], frozen: list[str]) -> list[Rule]:
    """What the rules say of each parameter; what none of them matches is trained in full.

    Args:
        candidates: The parameters; those that a rule takes are marked as ruled.
        rules: Globs with what they say.
        frozen: Names of the parameters that do not require a gradient.

    Returns:
        A rule for each candidate.

    Raises:
        SpecError: A rule matches nothing, or nothing that it can be meant for.
    """
    chosen: list[Rule] = [None] * len(candidates)
    taken: set[int] = set()
    for glob, rule in rules.items():
        matched = [i for i, c in enumerate(candidates) if any(fnmatchcase(name, glob) for name in c.known_as())]
        usable = [i for i in matched if not isinstance(rule, Transform) or candidates[i].param.dim() >= 2]
        fresh = [i for i in usable if i not in taken]
        if not fresh:
            name = next((n for n in frozen if fnmatchcase(n, glob) or fnmatchcase(n.rpartition(".")[0], glob)), None)
            if rule is FROZEN and name is not None:
                continue  # what it asks for holds: rules may be written once, for models that come with frozen parts or without
            raise SpecError(f"rule '{glob}' {_idle(glob, matched, usable, candidates, name)}")
        for i in fresh:
            chosen[i] = rule
            candidates[i].ruled = True
        taken.update(matched)
    return chosen


def _idle(glob: str, matched: list[int], usable: list[int], candidates: list[Candidate], frozen: str | None) -> str:
    """Why a rule does nothing."""
    if not matched and frozen is not None:
        return (
            f"matches frozen parameters only, such as '{frozen}' (requires_grad is False); unfreeze what it should train, or "
            "leave the rule out"
        )
    if not matched:
        return f"matches no trainable parameter{_near(glob, candidates)}"
    if not usable:
        first = candidates[matched[0]]
        return (
            f"matches nothing that can be transformed: '{first.names[0]}' has shape {tuple(first.param.shape)}, and a "
            "transform needs two dimensions or more"
        )
    return "is never reached: the rules before it take every parameter it matches"


def _near(glob: str, candidates: list[Candidate]) -> str:
    """End a sentence about a glob that matches nothing: the same glob with its misspelt part corrected, and an example."""
    words = {word.lower(): word for c in candidates for name in c.known_as() for word in name.split(".")}
    corrected = []
    for part in glob.split("."):
        bare = part.strip("*?")
        known = any(fnmatchcase(word, part) for word in words.values())
        near = [] if known else get_close_matches(bare.lower(), words, n=1, cutoff=0.5)
        corrected.append(part.replace(bare, words[near[0]]) if near and bare else part)
    guess = ".".join(corrected)
    names = {name for c in candidates if c.param.dim() >= 2 for name in c.known_as()}
    tried = (guess, f"*.{guess}", f"*.{guess}.*", f"*{guess}*")
    hit = next((f"; did you mean '{g}'?" for g in tried if any(fnmatchcase(name, g) for name in names)), ".")
    owners = [name.rpartition(".")[0] for c in candidates if c.param.dim() >= 2 for name in c.names]
    return f"{hit} Rules are globs over module names, such as '{max(owners, key=len, default='')}'."
