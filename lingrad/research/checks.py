"""What the values of a plan may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lingrad.errors import SpecError, did_you_mean, in_short, require, require_one_of
from lingrad.research.diagnostics import make_diagnostic
from lingrad.research.objects import is_object, load_object

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "halving"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "float64", "bfloat16"]  # of weights
Match = Literal["state_bytes", "seconds"]
MOST_RUNGS = 10
ALONE = ("gap", "gap_switched", "gap_control", "reproducible")  # diagnostics of runs of one process


def check_budget(steps: int | None, tokens: int | None, where: str) -> None:
    """Check that one of the two is given, and how much it is.

    Args:
        steps: The steps of a run.
        tokens: Its budget of tokens.
        where: What messages call the plan.

    Raises:
        SpecError: None or both are given, or one is too small.
    """
    given = f"{where}, [task]: 'steps' is missing, a whole number; or 'tokens', a budget of them"
    require(steps is not None or tokens is not None, "steps", given)
    require(steps is None or tokens is None, "tokens", f"{where}, [task] has both 'steps' and 'tokens'; leave one of them out")
    require(steps is None or steps >= 2, "steps", f"{where}, [task]: 'steps' must be 2 or more, not {steps}")
    require(tokens is None or tokens >= 1, "tokens", f"{where}, [task]: 'tokens' must be 1 or more, not {tokens}")


def check_plan(values: Mapping[str, Any], names: Sequence[str], where: str, *, searched: bool) -> None:
    """Check the values of a plan that no task or entry checks.

    Args:
        values: Key -> value.
        names: Those of the entries.
        where: What messages call the plan.
        searched: Whether there are trials.

    Raises:
        SpecError: One of them is wrong.
    """
    for key, allowed in (
        ("sampler", Sampler),
        ("pruner", Pruner),
        ("schedule", Schedule),
        ("dtype", Dtype),
    ):
        require_one_of(values[key], get_args(allowed), key)
    require(0.0 <= values["warmup"] < 1.0, "warmup", f"{where}, [run]: 'warmup' is a share of the steps, 0 or more and below 1")
    rungs, processes = values["rungs"], values["processes"]
    require(1 <= rungs <= MOST_RUNGS, "rungs", f"{where}, [search]: 'rungs' must be from 1 to {MOST_RUNGS}, not {rungs}")
    require(processes >= 1, "processes", f"{where}, [run]: 'processes' must be 1 or more, not {processes}")
    alone = [text for text in values["diagnostics"] if text.partition("(")[0] in ALONE]
    require(
        processes == 1 or not alone, "diagnostics",
        f"{where}: the diagnostics {' and '.join(alone)} are for runs of one process; leave them out, or 'processes'",
    )  # fmt: skip
    seeds = values["seeds"]
    whole = bool(seeds) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds) and len(set(seeds)) == len(seeds)
    require(whole, "seeds", f"{where}: 'seeds' must be a list of different whole numbers, 0 or more and below 2^32")
    require(0 <= values["seed"] < 2**32, "seed", f"{where}, [search]: 'seed' must be 0 or more and below 2^32")
    try:
        torch.empty(0, device=values["device"])
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        why = f"{where}, [run]: there is no device '{values['device']}' here: {in_short(error)}"
        raise SpecError(why, option="device") from None
    apart = not searched or values["seed"] not in seeds
    require(apart, "seeds", f"{where}: seed {values['seed']} is that of the search; judge by other seeds")
    require(len({name.lower() for name in names}) == len(names), "name", f"{where}: two entries have one name")
    if values["match"] is None:
        require(not values["match_entry"], "entry", f"{where}, [match]: 'equal' is missing: {' or '.join(get_args(Match))}")
        return
    require_one_of(values["match"], get_args(Match), "equal")
    near = did_you_mean(values["match_entry"], names)
    require(
        bool(values["match_entry"]), "entry", f"{where}, [match]: 'entry' is missing: that which the others are matched with"
    )
    if values["match_entry"] not in names:
        raise SpecError(f"{where}, [match]: there is no entry '{values['match_entry']}'{near}", option="entry")


def check_observers(diagnostics: Sequence[Any], trackers: Sequence[Any], where: str, folder: Path) -> None:
    """Check what measures and logs runs. Whether the packages of trackers are installed is seen before anything trains.

    Args:
        diagnostics: Names of diagnostics.
        trackers: Names of trackers.
        where: What messages call the table that names them.
        folder: What names of files are relative to.

    Raises:
        SpecError: There is no such diagnostic, or one is named twice.
    """
    for text in diagnostics:
        make_diagnostic(text, folder)  # raises where there is none
    for text in trackers:
        if is_object(text):
            load_object(text, folder)
    for key, names in (("diagnostics", diagnostics), ("trackers", trackers)):
        require(len(set(names)) == len(names), key, f"{where}: '{key}' names one of them twice; leave it out once")
