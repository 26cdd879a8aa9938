"""Published methods by name, with what each keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lingrad.config import spec
from lingrad.config.methods import Chosen, method_of
from lingrad.config.published import METHODS
from lingrad.config.residual import parse_residual
from lingrad.console import markdown
from lingrad.memory.estimate import estimate
from lingrad.methods import BASELINES

SHAPE, RANK = (4096, 4096), 128  # of the weight whose state the table gives


HEADER = ("method", "is", "adapter mode", "reads G", f"state, MB, {SHAPE[0]} x {SHAPE[1]}, r {RANK}", "from", "differs")


def published() -> dict[str, tuple[str, str]]:
    """The names of methods and of baselines that were published.

    Returns:
        Name -> how it is written with its options, and where it was published: authors, year, arXiv number.
    """
    found = {name: (_written(name, method.options), method.paper) for name, method in METHODS.items()}
    return found | {name: (_written(name, one.options), one.paper) for name, one in BASELINES.items() if one.paper}


def table() -> str:
    """The methods as a table in Markdown; see `rows`."""
    return markdown([HEADER, *(tuple(row.values()) for row in rows())]).rstrip()


def rows() -> list[dict[str, str]]:
    """The methods, by what a column of the table says.

    Returns:
        For each, and for baselines of other packages, its name and defaults, what it is a combination of, whether adapter mode
        has the same run, when it reads the gradient itself, bytes of bases and state for one weight in bfloat16, and where it
        was published.
    """
    found: list[tuple[str, ...]] = []
    for name, method in METHODS.items():
        required = [key for key, value in method.options.items() if value is None]  # of a rank, or a number of steps
        chosen = method_of(f"{name}({', '.join(f'{key}={RANK}' for key in required)})")
        assert chosen is not None  # noqa: S101 - it is in the table
        residual = chosen.settings.get("residual")
        shown = str(chosen).replace(f"={RANK}", "=...")
        dual = "only" if "keep_remainder" in chosen.settings else "refused" if residual else "the same run"
        state = f"{_state(chosen):.2f}"
        found.append(
            (f"`{_written(name, method.options)}`", f"`{shown}`", dual, _reads(chosen), state, method.paper, method.differs)
        )
    for name, other in BASELINES.items():
        options = ", ".join(key if value is None else f"{key}={value}" for key, value in other.options.items())
        called = f'`lingrad.methods.baseline("{name}"{", " * bool(options)}{options})`'
        found.append((called, f"of {other.package}, to compare with", "no dual", "at every step", "", other.paper, ""))
    return [dict(zip(HEADER, row, strict=True)) for row in found]


def _written(name: str, options: Mapping[str, Any]) -> str:
    """A name with its options and their defaults in brackets."""
    inner = ", ".join(key if value is None else f"{key}={value}" for key, value in options.items())
    return f"{name}({inner})"


def _reads(chosen: Chosen) -> str:
    residual = chosen.settings.get("residual")
    chance = 0.0 if residual is None else parse_residual(residual).chance
    if chance == 1:
        return "at every step"
    found = ["at refreshes"] if spec.parse(chosen.rules).reads == "gradient" else []
    return " and ".join(found + [f"in {chance:g} of steps"] * (chance > 0)) or "never"


def _state(chosen: Chosen) -> float:
    """Megabytes of bases and optimizer state."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(*SHAPE, bias=False, dtype=torch.bfloat16))
    options = {key: value for key, value in {**chosen.settings, **chosen.base_options}.items() if key != "keep_remainder"}
    totals = estimate(model, {"0": chosen.rules}, chosen.base, lr=1e-3, **options).totals
    return (totals.get("basis", 0) + totals.get("moments", 0)) / 1e6
