"""A plan: what a study compares, in one file of TOML, and how every entry of it is tuned.

name = "kinds of map"
seeds = [1, 2, 3]                     # of the final runs
imports = ["my_map.py"]               # files that are run first, such as those that register a transform

[task]
kind = "text"                         # or FILE.py:CLASS
steps = 100

[search]
sampler = "grid"                      # or "random", "tpe"
trials = 4                            # of every entry
space = {lr = [1e-3, 2e-3, 4e-3, 8e-3]}

[[entries]]
name = "GaLore"
method = "galore(rank=32)"            # or a config string, or FILE.py:OBJECT; or baseline = "lora(rank=16)"
options = {carry = "rotate"}          # of `lingrad.wrap`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from lingrad.config.settings import Mode
from lingrad.errors import DataError, SpecError, did_you_mean, in_short, optional, require, require_one_of, shown
from lingrad.files.reading import open_plain
from lingrad.research.axes import Axis, grid, read_space
from lingrad.research.diagnostics import make_diagnostic
from lingrad.research.objects import is_object, load_file
from lingrad.research.schema import Table
from lingrad.research.task import Task
from lingrad.research.tasks import make_task

Sampler = Literal["grid", "random", "tpe"]
Schedule = Literal["constant", "linear", "cosine"]
Match = Literal["state_bytes", "seconds"]
LARGEST = 2**20  # bytes of a plan


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One way to train.

    Args:
        name: Its name in reports, of which no two are equal.
        method: A config string, the name of a method, or ``FILE.py:OBJECT``; empty where ``baseline`` is given.
        baseline: The name of a baseline of `lingrad.methods`, with its options; empty where ``method`` is given.
        mode: The mode of a method.
        options: Options of the run: those of `lingrad.wrap`, or of the baseline.
        space: What is searched.
    """

    name: str
    method: str = ""
    baseline: str = ""
    mode: Mode = "optimizer"
    options: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Axis] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ResearchPlan:
    """A study.

    Args:
        name: Its name.
        folder: What names of files in it are relative to.
        content: The file's content.
        code: SHA-256 of each file of code that it names.
        quick: Whether it was cut down.
        task: What is trained and how it is judged.
        entries: What is compared.
        steps: Steps of a run; 0 where ``tokens`` says when it ends.
        tokens: A budget of tokens: a run ends with the step that reaches it. 0 where ``steps`` says when.
        warmup: Share of the steps in which the learning rate rises from nothing.
        schedule: What it does afterwards.
        sampler: Which trials are made.
        trials: How many of every entry.
        seed: Of the search: its trials differ in nothing else but what is searched.
        seeds: Of the final runs of the best trial; none of them is ``seed``.
        dtype: Of the weights.
        device: Where runs train.
        match: What final runs have equal: ``state_bytes`` sets the rank of every entry that has one to the largest whose
            bytes of state are no more than those of the entry ``match_entry``; ``seconds`` gives every entry as many steps as
            take the time of that entry's runs, by what steps took in its trials.
        match_entry: The entry that the others are matched with.
        diagnostics: What is measured of each run besides its losses; see `lingrad.research.diagnostics`.
    """

    name: str
    folder: Path
    content: Mapping[str, Any]
    code: Mapping[str, str]
    quick: bool
    task: Task
    entries: tuple[PlanEntry, ...]
    steps: int
    tokens: int = 0
    warmup: float = 0.1
    schedule: Schedule = "cosine"
    sampler: Sampler = "grid"
    trials: int = 1
    seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    dtype: str = "float32"
    device: str = "cpu"
    match: Match | None = None
    match_entry: str = ""
    diagnostics: tuple[str, ...] = ("energy",)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of what the study is; the same for the same content and code."""
        return sha256(json.dumps([self.content, self.code, self.quick], sort_keys=True).encode()).hexdigest()[:12]

    def entry(self, name: str) -> PlanEntry:
        """The entry of a name."""
        return next(entry for entry in self.entries if entry.name == name)


def open_plan(path: Path, *, quick: bool = False) -> ResearchPlan:
    """Read a plan.

    Args:
        path: A file of TOML.
        quick: Cut it down to see that it runs: a tenth of the steps, one trial, one seed.

    Returns:
        The plan.

    Raises:
        DataError: The file cannot be read, or is no TOML.
        SpecError: A key or a value is wrong; the message says which, and what was expected.
    """
    toml = optional("tomllib", "reading a plan", "") if _has_tomllib() else optional("tomli", "reading a plan", "research")
    try:
        with open_plain(path) as file:
            content = toml.loads(file.read(LARGEST).decode())
    except OSError as error:
        raise DataError(f"cannot read the plan {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the plan {path} is not in UTF-8 (byte {error.start})") from error
    except toml.TOMLDecodeError as error:
        raise DataError(f"the plan {path} is no TOML: {error}") from error
    return make_plan(content, path.name, path.absolute().parent, quick=quick)


def make_plan(content: Mapping[str, Any], where: str, folder: Path, *, quick: bool = False) -> ResearchPlan:
    """A plan of its content.

    Args:
        content: As of a file of TOML.
        where: What messages call it.
        folder: What names of files in it are relative to.
        quick: See `open_plan`.

    Returns:
        The plan.

    Raises:
        SpecError: A key or a value is wrong.
    """
    table = Table(content, where)
    name = table.take("name", str)
    imports = table.take("imports", list, [])
    for file in imports:  # which may register transforms
        require(isinstance(file, str), "imports", f"{where}: 'imports' must be names of files, not {shown(file)}")
        load_file(file, folder)
    task_table, search, run, match = (table.table(key) for key in ("task", "search", "run", "match"))
    steps, tokens = (task_table.take(key, int, None) for key in ("steps", "tokens"))
    kind = task_table.take("kind", str)
    shared = read_space(search.table("space"))
    values: dict[str, Any] = {
        "sampler": search.take("sampler", str, "grid"),
        "seed": search.take("seed", int, 0),
        "seeds": tuple(table.take("seeds", list, [1, 2, 3])),
        "warmup": run.take("warmup", float, 0.1),
        "schedule": run.take("schedule", str, "cosine"),
        "dtype": run.take("dtype", str, "float32"),
        "device": run.take("device", str, "cpu"),
        "diagnostics": tuple(run.take("diagnostics", list, ["energy"])),
        "match": match.take("equal", str, None),
        "match_entry": match.take("entry", str, ""),
    }
    asked = search.take("trials", int, 0)
    entries = tuple(_entry(one, shared) for one in table.tables("entries"))
    for left in (search, run, match, table):
        left.end()
    task = make_task(kind, task_table, folder)
    trials = 1 if quick else _trials(asked, values["sampler"], entries, where)
    _check_budget(steps, tokens, where)
    _check(values, entries, where)
    if quick:
        steps, tokens = (None if budget is None else max(2, budget // 10) for budget in (steps, tokens))
        values["seeds"] = values["seeds"][:1]
    for text in values["diagnostics"]:
        make_diagnostic(text, folder)  # raises where there is none
    twice = len(set(values["diagnostics"])) < len(values["diagnostics"])
    require(not twice, "diagnostics", f"{where}, [run]: 'diagnostics' names one of them twice; leave it out once")
    objects = (kind, *values["diagnostics"], *(one.method for one in entries))
    files = {*imports, *(text.rpartition(":")[0] for text in objects if is_object(text))}
    code = {file: sha256((folder / file).read_bytes()).hexdigest() for file in sorted(files)}
    values |= {"name": name, "folder": folder, "content": content, "code": code, "quick": quick}
    return ResearchPlan(task=task, entries=entries, steps=steps or 0, tokens=tokens or 0, trials=trials, **values)


def _entry(table: Table, shared: Mapping[str, Axis]) -> PlanEntry:
    name, method, baseline = table.take("name", str), table.take("method", str, ""), table.take("baseline", str, "")
    mode = table.take("mode", str, "optimizer")
    options, own = table.take("options", dict, {}), read_space(table.table("space"))
    table.end()
    where = f"entry '{name}'"
    require(bool(name.strip()), "name", f"{table.where}: 'name' is empty")
    require(
        bool(method) != bool(baseline),
        "method",
        f"{where} needs either a method or a baseline: a config string such as "
        '"galore(rank=32)", or one of `lingrad methods` such as "lora(rank=16)"',
    )
    require_one_of(mode, get_args(Mode), "mode")
    require(not baseline or mode == "optimizer", "mode", f"{where}: a baseline has no mode; leave it out")
    space = {**{key: axis for key, axis in shared.items() if key not in options}, **own}
    for key in own:
        require(key not in options, key, f"{where} has '{key}' in its options and in its space; leave one of them out")
    return PlanEntry(name=name, method=method, baseline=baseline, mode=cast("Mode", mode), options=options, space=space)


def _trials(asked: int, sampler: str, entries: tuple[PlanEntry, ...], where: str) -> int:
    """How many trials each entry has: the same for all, whatever is searched of them."""
    if sampler != "grid":
        require(asked >= 1, "trials", f"{where}, [search]: 'trials' must be 1 or more: the trials of every entry")
        return asked
    sizes = {entry.name: len(grid(entry.space)) for entry in entries}
    trials = asked or max(sizes.values())
    for name, size in sizes.items():
        require(
            size == trials, "trials",
            f"entry '{name}' has a grid of {size} points where the budget is {trials} trials; every entry must have the same: "
            'give all grids one size, or take sampler = "random"',
        )  # fmt: skip
    return trials


def _check_budget(steps: int | None, tokens: int | None, where: str) -> None:
    given = f"{where}, [task]: 'steps' is missing, a whole number; or 'tokens', a budget of them"
    require(steps is not None or tokens is not None, "steps", given)
    require(steps is None or tokens is None, "tokens", f"{where}, [task] has both 'steps' and 'tokens'; leave one of them out")
    require(steps is None or steps >= 2, "steps", f"{where}, [task]: 'steps' must be 2 or more, not {steps}")
    require(tokens is None or tokens >= 1, "tokens", f"{where}, [task]: 'tokens' must be 1 or more, not {tokens}")


def _check(values: Mapping[str, Any], entries: tuple[PlanEntry, ...], where: str) -> None:
    for key, allowed in (("sampler", Sampler), ("schedule", Schedule), ("dtype", Literal["float32", "float64", "bfloat16"])):
        require_one_of(values[key], get_args(allowed), key)
    require(0.0 <= values["warmup"] < 1.0, "warmup", f"{where}, [run]: 'warmup' is a share of the steps, 0 or more and below 1")
    seeds = values["seeds"]
    whole = bool(seeds) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds) and len(set(seeds)) == len(seeds)
    require(whole, "seeds", f"{where}: 'seeds' must be a list of different whole numbers, 0 or more and below 2^32")
    require(0 <= values["seed"] < 2**32, "seed", f"{where}, [search]: 'seed' must be 0 or more and below 2^32")
    try:
        torch.empty(0, device=values["device"])
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        why = f"{where}, [run]: there is no device '{values['device']}' here: {in_short(error)}"
        raise SpecError(why, option="device") from None
    require(values["seed"] not in seeds, "seeds", f"{where}: seed {values['seed']} is that of the search; judge by other seeds")
    names = [entry.name for entry in entries]
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


def _has_tomllib() -> bool:
    return find_spec("tomllib") is not None  # from Python 3.11
