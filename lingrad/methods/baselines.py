"""Methods of others by name, to compare with: none is a linear map with an exact dual."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lingrad.errors import SpecError, did_you_mean, require
from lingrad.methods.apollo import Apollo
from lingrad.methods.base import FullRank, Lora, Method
from lingrad.methods.column_normalized import ColumnNormalized
from lingrad.methods.relora import ReLora


@dataclass(frozen=True)
class Baseline:
    """A method of others.

    Args:
        make: Makes it, of its options and those of its optimizer, such as ``lr``.
        options: Its own options with their defaults; None must be given.
        package: The package that computes its steps.
        paper: Authors, year, arXiv number.
    """

    make: Callable[..., Method]
    options: Mapping[str, Any]
    package: str
    paper: str


def _full(name: str, **fixed: Any) -> Callable[..., Method]:
    return lambda **options: FullRank(name, {**fixed, **options})


def _lora(**kind: Any) -> Callable[..., Method]:
    def make(*, rank: int, **options: Any) -> Method:
        own = {"ratio": options.pop("ratio")} if "ratio" in options else {}
        return Lora(rank, "adamw", options, **{**kind, **own})

    return make


def _apollo(*, mini: bool) -> Callable[..., Method]:
    return lambda *, rank, **options: Apollo(rank, mini, options)


def _relora(*, rank: int, every: int, prune: float, **options: Any) -> Method:
    return ReLora(rank, every, prune, options)


def _scale(**options: Any) -> Method:
    return ColumnNormalized(options)


APOLLO = "Zhu et al., MLSys 2025, arXiv 2412.05270, algorithm 1"
BASELINES: dict[str, Baseline] = {
    "adamw": Baseline(_full("adamw"), {}, "torch", "Loshchilov, Hutter, ICLR 2019, arXiv 1711.05101"),
    "sgd_momentum": Baseline(_full("sgd", momentum=0.9), {}, "torch", ""),
    "muon": Baseline(_full("muon"), {}, "torch", "Jordan et al., 2024, kellerjordan.github.io/posts/muon"),
    "lora": Baseline(_lora(), {"rank": None}, "peft", "Hu et al., ICLR 2022, arXiv 2106.09685"),
    "rslora": Baseline(_lora(rslora=True), {"rank": None}, "peft", "Kalajdzievski, 2023, arXiv 2312.03732"),
    "lora_plus": Baseline(_lora(), {"rank": None, "ratio": 16.0}, "peft", "Hayou et al., ICML 2024, arXiv 2402.12354"),
    "relora": Baseline(
        _relora, {"rank": None, "every": 5000, "prune": 0.99}, "peft", "Lialin et al., ICLR 2024, arXiv 2307.05695"
    ),
    "apollo": Baseline(_apollo(mini=False), {"rank": None, "seed": 0}, "lingrad.methods", APOLLO),
    "apollo_mini": Baseline(_apollo(mini=True), {"rank": 1, "seed": 0}, "lingrad.methods", APOLLO),
    "scale": Baseline(_scale, {}, "lingrad.methods", "Glentis et al., 2025, arXiv 2506.16659, algorithm 1"),
}


def baseline(name: str, **options: Any) -> Method:
    """A method of others by name.

    Args:
        name: A key of `BASELINES`.
        **options: Its options, and those of its optimizer.

    Returns:
        The method.

    Raises:
        SpecError: There is none of that name, or an option that must be given is missing.
    """
    if name not in BASELINES:
        raise SpecError(f"unknown baseline '{name}'{did_you_mean(name, BASELINES)} Known: {', '.join(BASELINES)}")
    found = BASELINES[name]
    values = {**found.options, **options}
    for key, value in values.items():
        require(value is not None, key, f"baseline '{name}' needs {key}, as in baseline('{name}', {key}=16)")
    rank = values.get("rank", 1)
    require(
        type(rank) is int and rank >= 1, "rank", f"rank of baseline '{name}' must be a whole number, 1 or more, not {rank!r}"
    )
    require("rank" in found.options or "rank" not in values, "rank", f"baseline '{name}' has no rank; leave it out")
    return found.make(**values)
