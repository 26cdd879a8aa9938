"""The combinations that tests run over, made from the registries, so that a new transform or base is in them by itself."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_origin

import torch

from lingrad import optimizers
from lingrad.config import spec
from lingrad.config.settings import MOVES
from lingrad.errors import DualityError
from lingrad.optimizers.moments import moment_kinds
from lingrad.testing.oracles import assert_dual
from lingrad.testing.training import token_batches
from lingrad.transforms import BasisTransform, registry
from lingrad.transforms.options import kinds
from tests.support.models import zoo

# one config string of each transform, at the smallest rank
ALL_SPECS = (
    "svd(rank=1, every=2)",
    "power(rank=1, every=2)",
    "random(rank=1, every=2)",
    "random(rank=1, every=2, kind=rows)",
    "pca(rank=1)",
    "svd(rank=1, every=2, choice=sigma)",
    "rows(rank=1, every=2)",
    "dct(rank=1, every=2)",
    "switch(rank=1, every=2, after=3)",
    "weight(rank=1)",
    "kron(left=svd(rank=1, every=2), right=random(rank=1, every=3))",
    "coded(each=svd(rank=1, every=2), bits=4)",
    "full()",
)

SIDES = ("short", "long", "left", "right", "both")

# Every transform with each solver and kind, refreshing every 7 steps; {side} is filled in by the test.
SIDED = (
    "svd(rank=4, every=7, side={side})",
    "svd(rank=4, every=7, side={side}, solver=gram)",
    "svd(rank=4, every=7, side={side}, solver=randomized)",
    "svd(rank=4, every=7, side={side}, solver=randomized, oversample=1)",
    "power(rank=4, every=7, side={side})",
    "random(rank=4, every=7, side={side}, kind=gaussian)",
    "random(rank=4, every=7, side={side}, kind=rademacher)",
    "random(rank=4, every=7, side={side}, kind=orthonormal)",
    "random(rank=4, every=7, side={side}, kind=rows)",
    "random(rank=4, every=7, side={side}, store=false)",
    "pca(rank=4, side={side})",
    "pca(rank=4, every=7, side={side}, optimizer=sgd(momentum=0.9), lr=0.1, orthonormalize=true)",
    "coded(each=svd(rank=4, every=7, side={side}), bits=4)",
    "svd(rank=4, every=7, side={side}, choice=sigma)",
    "svd(rank=4, every=7, side={side}, solver=gram, choice=sqrt_sigma)",
    "svd(rank=4, every=7, side={side}, solver=randomized, choice=sigma)",
    "rows(rank=4, every=7, side={side})",
    "rows(rank=4, every=7, side={side}, choice=norm)",
    "rows(rank=4, every=7, side={side}, choice=square)",
    "dct(rank=4, every=7, side={side})",
    "dct(rank=4, every=7, side={side}, store=false)",
    "switch(rank=4, every=7, side={side}, after=5)",
    "weight(rank=4, side={side})",
    "weight(rank=4, every=7, side={side})",
)
UNSIDED = (
    "kron(left=svd(rank=4, every=7), right=random(rank=3, every=5))",
    "kron(left=random(rank=4, every=7, kind=rows), right=random(rank=3, every=7, kind=rows))",
    "kron(left=power(rank=4, every=7), right=random(rank=3, every=7, kind=rows))",
    "coded(each=kron(left=power(rank=4, every=7), right=svd(rank=3, every=5)))",
    "full()",
)
SPECS = tuple(text.format(side=side) for text in SIDED for side in SIDES) + UNSIDED

BASES = {
    "adamw": {"lr": 1e-2},
    "sgd": {"lr": 1e-1, "momentum": 0.9},
    "lion": {"lr": 1e-3},
}

CARRIES = ("keep", "reset", "rotate", "transport")
CLIPS = (None, 0.05)

# options that a transform must be given besides its rank
REQUIRED = {"switch": ", after=5"}

# What a base needs to be tried well; a base that is not here is tried as it is, with lr=1e-2.
# eps: S^T G of both-sided singular vectors is diagonal but for rounding; these bases divide an entry by its own size plus eps.
_OPTIONS = {
    "sgd": ({"lr": 1e-1}, {"lr": 1e-1, "momentum": 0.9, "nesterov": True}),
    "lion": ({"lr": 1e-3},),
    "adam": ({"eps": 1e-4},),
    "adamw": ({"eps": 1e-4}, {"eps": 1e-4, "amsgrad": True}),
    "adagrad": ({"eps": 1e-4},),
    "rmsprop": ({"eps": 1e-3}, {"eps": 1e-3, "centered": True, "momentum": 0.9}),
    "adamw8bit": ({"min_8bit_size": 16},),  # so that the moments of small coordinates are quantised too
}


def variants():
    """Config strings with {side} where it has one: each transform, and each value of each of its words and switches."""
    # of one matrix, since the zoo's weights have no other divisor; more are in tests/transforms/test_experts.py
    found = [*SIDED, *UNSIDED, "experts(each=svd(rank=4, every=7), count=1)"]
    for name in registry.transform_names():
        cls = registry.find_transform(name)
        if not issubclass(cls, BasisTransform):
            continue
        text = f"{name}(rank=4, every=7, side={{side}}{REQUIRED.get(name, '')}"
        found.append(f"{text})")
        for option in dataclasses.fields(cls):
            (kind, *_) = kinds(cls)[option.name]
            if option.name in ("side", "clip"):
                continue
            if get_origin(kind) is Literal:
                found += [f"{text}, {option.name}={value})" for value in kind.__args__]
            elif kind is bool:
                found.append(f"{text}, {option.name}={str(not option.default).lower()})")
    # a value may be the default, so that two strings say the same
    return list({spec.format(spec.parse(text.format(side="left"))): text for text in reversed(found)}.values())[::-1]


def base_options():
    """(name, options) of every base."""
    return [(name, {"lr": 1e-2} | options) for name in optimizers.names() for options in _OPTIONS.get(name, ({},))]


def rotates(base, options):
    """Whether carry=rotate and transport are accepted, which moments that are quantised, factored or normalised forbid."""
    return _rotates(base, tuple(options.items()))


@functools.cache
def _rotates(base, options):
    try:
        moment_kinds(optimizers.find(base, dict(options)))
    except DualityError:
        return False
    return True


class Tolerance(NamedTuple):
    """The largest relative difference of any weight that may be left between the modes, and why it may be as large."""

    value: float
    reason: str


EXACT = Tolerance(1e-12, "the modes add up in another order: 1e-16 a step, amplified by the inverse of singular gaps")
SINGLE = Tolerance(5e-5, "the same in float32: 1e-7 a step")
BFLOAT16 = Tolerance(2e-2, "a weight is rounded to 2^-8 at each merge: at every step, or at each refresh")
SAMPLES = Tolerance(5e-2, "the same, and a number so near to the edge that another vector is drawn")
SIGNS = Tolerance(
    1e-2, "S^T G of both-sided singular vectors is diagonal but for rounding, and lion steps by each entry's sign"
)
CODES = Tolerance(1e-2, "moments of 8 bits: rounding that crosses an edge comes back as up to 1 % of an entry's step")
MUON = Tolerance(1e-3, "muon orthogonalises in bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One combination of the matrix: three runs of it, optimizer mode, adapter mode and switching, must give the same weights.

    ``rules`` is a config string with {side} where it has one; ``options`` are those of the base, lr included; ``clip`` is the
    norm to clip gradients to, or None.
    """

    rules: str
    side: str = "short"
    carry: str = "keep"
    base: str = "adamw"
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"lr": 1e-2})
    clip: float | None = None

    @property
    def axes(self):
        """What a case is a combination of; a base counts together with its options."""
        return self.rules, self.side, self.carry, (self.base, self.options), self.clip

    @property
    def spec(self):
        """The config string for this side."""
        return self.rules.format(side=self.side)

    @property
    def label(self):
        """A test's name."""
        given = ",".join(f"{key}={value}" for key, value in self.options.items() if key != "lr")
        return f"{self.spec}-{self.base}{f'({given})' if given else ''}-{self.carry}{'-clip' if self.clip else ''}"

    def tolerance(self, dtype=torch.float64):
        """How far the modes may be apart in this dtype."""
        if dtype == torch.bfloat16:
            return (
                SAMPLES if "sigma" in self.rules or "choice=norm" in self.rules or "choice=square" in self.rules else BFLOAT16
            )
        if (self.base, self.carry, self.side) == ("lion", "reset", "both") and not self.rules.startswith("random("):
            return SIGNS
        if self.base == "adamw8bit":
            return CODES
        if self.base == "muon":
            return MUON
        return EXACT if dtype == torch.float64 else SINGLE

    def run(self, dtype=torch.float64):
        """The largest gap of seven steps on every kind of weight: refreshes in steps 0, 3 and 6, switches before 2 and 5."""
        options = {"weight_decay": 0.1, "scale": 0.25, "carry": self.carry, **self.options}
        if dtype == torch.bfloat16:
            options["lr"] /= 10
        return assert_dual(
            self.spec.replace("every=7", "every=3").replace("every=5", "every=2"),
            self.base,
            build=lambda: zoo(dtype),
            batches=token_batches(7),
            tolerance=self.tolerance(dtype).value,
            clip=self.clip,
            **options,
        )


@functools.cache
def all_cases():
    """The whole product, without what is refused or the same."""
    return tuple(_product())


def _product():
    for rules, side, carry, (base, options), clip in itertools.product(variants(), SIDES, CARRIES, base_options(), CLIPS):
        if "{side}" not in rules and side != "short":
            continue
        if carry in MOVES and not rotates(base, options):
            continue
        # without alignment the signs of singular vectors are decided by rounding, and moments that are carried refer to them
        if "align=false" in rules and carry != "reset":
            continue
        yield Case(rules=rules, side=side, carry=carry, base=base, options=options, clip=clip)


def covering(combinations, size, axes=tuple):
    """A small part of some combinations in which every ``size`` of values that they have together stand in at least one.

    ``axes`` gives the values of a combination.
    """
    combinations, held, holders = list(combinations), [], {}
    for number, found in enumerate(combinations):
        values = [(i, repr(value)) for i, value in enumerate(axes(found))]
        held.append([*itertools.combinations(values, size)])
        for together in held[-1]:
            holders.setdefault(together, []).append(number)
    missing = [len(every) for every in held]  # what no chosen one holds, of each
    chosen = []
    order = sorted(range(len(combinations)), key=lambda i: (i * 7919) % len(combinations))  # spread, but the same at every run
    for wanted in range(len(held[0]), 0, -1):
        for number in order:
            if missing[number] >= wanted:
                chosen.append(combinations[number])
                for together in held[number]:
                    for other in holders.pop(together, ()):
                        missing[other] -= 1
    return chosen


def covering_cases(size):
    """The small part of `all_cases` in which all ``size`` axes meet."""
    return covering(all_cases(), size, axes=lambda case: case.axes)
