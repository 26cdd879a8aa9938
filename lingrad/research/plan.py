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
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args

from lingrad.config.settings import Mode
from lingrad.errors import DataError, optional, require, require_one_of
from lingrad.files.reading import read_text
from lingrad.research.axes import Axis, grid, read_space
from lingrad.research.checks import Dtype, Match, Pruner, Sampler, Schedule, check_budget, check_observers, check_plan
from lingrad.research.objects import is_object, load_file
from lingrad.research.schema import Table
from lingrad.research.task import Task
from lingrad.research.tasks import make_task

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
        dtype: Of the weights, where it is not the plan's.
        diagnostics: What is measured of its runs, where it is not what the plan says.
    """

    name: str
    method: str = ""
    baseline: str = ""
    mode: Mode = "optimizer"
    options: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Axis] = field(default_factory=dict)
    dtype: str = ""
    diagnostics: tuple[str, ...] | None = None


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
        pruner: Which trials are stopped on their way; see `lingrad.research.pruning`.
        rungs: At how many steps they are judged for it.
        trials: How many of every entry; none where nothing is searched.
        seed: Of the search: its trials differ in nothing else but what is searched.
        seeds: Of the final runs of the best trial; none of them is ``seed``.
        dtype: Of the weights.
        device: Where runs train.
        processes: How many processes a run has, which share every batch.
        match: What final runs have equal: ``state_bytes`` sets the rank of every entry that has one to the largest whose
            bytes of state are no more than those of the entry ``match_entry``; ``seconds`` gives every entry as many steps as
            take the time of that entry's runs, by what steps took in its trials.
        match_entry: The entry that the others are matched with.
        diagnostics: What is measured of each run besides its losses; see `lingrad.research.diagnostics`.
        trackers: What each run is logged to besides its own files; see `lingrad.research.trackers`.
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
    pruner: Pruner = "none"
    rungs: int = 3
    trials: int = 1
    seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    dtype: str = "float32"
    device: str = "cpu"
    processes: int = 1
    match: Match | None = None
    match_entry: str = ""
    diagnostics: tuple[str, ...] = ("energy",)
    trackers: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of what the study is; the same for the same content and code."""
        return sha256(json.dumps([self.content, self.code, self.quick], sort_keys=True).encode()).hexdigest()[:12]

    def entry(self, name: str) -> PlanEntry:
        """The entry of a name."""
        return next(entry for entry in self.entries if entry.name == name)

    def of(self, entry: PlanEntry) -> ResearchPlan:
        """The plan as one entry has it, with its own dtype and diagnostics."""
        diagnostics = self.diagnostics if entry.diagnostics is None else entry.diagnostics
        return replace(self, dtype=entry.dtype or self.dtype, diagnostics=diagnostics)


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
    content = read_plan(path)
    return make_plan(content, path.name, path.absolute().parent, quick=quick)


def read_plan(path: Path) -> dict[str, Any]:
    """The content of a plan.

    Args:
        path: A file of TOML.

    Returns:
        Its tables.

    Raises:
        DataError: The file cannot be read, or is no TOML.
    """
    toml = optional("tomllib", "reading a plan", "") if _has_tomllib() else optional("tomli", "reading a plan", "research")
    try:
        content = toml.loads(read_text(path, "plan", largest=LARGEST))
    except toml.TOMLDecodeError as error:
        raise DataError(f"the plan {path} is no TOML: {error}") from error
    return dict(content)


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
    imports = table.texts("imports", [])
    for file in imports:  # which may register transforms
        load_file(file, folder)
    task_table, search, run, match = (table.table(key) for key in ("task", "search", "run", "match"))
    steps, tokens = (task_table.take(key, int, None) for key in ("steps", "tokens"))
    kind = task_table.take("kind", str)
    shared = read_space(search.table("space"))
    values: dict[str, Any] = {
        "sampler": search.take("sampler", str, "grid"),
        "pruner": search.take("pruner", str, "none"),
        "rungs": search.take("rungs", int, 3),
        "seed": search.take("seed", int, 0),
        "seeds": tuple(table.take("seeds", list, [1, 2, 3])),
        "warmup": run.take("warmup", float, 0.1),
        "schedule": run.take("schedule", str, "cosine"),
        "dtype": run.take("dtype", str, "float32"),
        "device": run.take("device", str, "cpu"),
        "diagnostics": tuple(run.texts("diagnostics", ["energy"])),
        "processes": run.take("processes", int, 1),
        "trackers": tuple(run.texts("trackers", [])),
        "match": match.take("equal", str, None),
        "match_entry": match.take("entry", str, ""),
    }
    asked = search.take("trials", int, 0)
    entries = tuple(_entry(one, shared) for one in table.tables("entries"))
    for left in (search, run, match, table):
        left.end()
    task = make_task(kind, task_table, folder)
    trials = _trials(asked, values["sampler"], entries, where)
    if not (asked or any(entry.space for entry in entries) or values["match"] == "seconds"):  # which are those of trials
        trials = 0
    trials = min(trials, 1) if quick else trials
    check_budget(steps, tokens, where)
    measured = {text: None for entry in entries for text in entry.diagnostics or ()}
    every = {**values, "diagnostics": (*values["diagnostics"], *measured)}
    check_plan(every, [entry.name for entry in entries], where, searched=trials > 0)
    if quick:
        steps, tokens = (None if budget is None else max(2, budget // 10) for budget in (steps, tokens))
        values["seeds"] = values["seeds"][:1]
    check_observers(values["diagnostics"], values["trackers"], f"{where}, [run]", folder)
    for entry in entries:
        check_observers(entry.diagnostics or (), (), f"{where}, entry '{entry.name}'", folder)
    objects = (kind, *values["diagnostics"], *measured, *values["trackers"], *(one.method for one in entries))
    files = {*imports, *(text.rpartition(":")[0] for text in objects if is_object(text))}
    code = {file: sha256((folder / file).read_bytes()).hexdigest() for file in sorted(files)}
    values |= {"name": name, "folder": folder, "content": content, "code": code, "quick": quick}
    return ResearchPlan(task=task, entries=entries, steps=steps or 0, tokens=tokens or 0, trials=trials, **values)


def _entry(table: Table, shared: Mapping[str, Axis]) -> PlanEntry:
    name, method, baseline = table.take("name", str), table.take("method", str, ""), table.take("baseline", str, "")
    mode = table.take("mode", str, "optimizer")
    options, own = table.take("options", dict, {}), read_space(table.table("space"))
    dtype, measured = table.take("dtype", str, ""), table.texts("diagnostics", None)
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
    if dtype:
        require_one_of(dtype, get_args(Dtype), "dtype")
    return PlanEntry(
        name=name, method=method, baseline=baseline, mode=cast("Mode", mode), options=options, space=space, dtype=dtype,
        diagnostics=None if measured is None else tuple(measured),
    )  # fmt: skip


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


def _has_tomllib() -> bool:
    return find_spec("tomllib") is not None  # from Python 3.11
