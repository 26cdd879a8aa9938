"""What the runs of a plan came to: read from their records, summed up by entry."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from lingrad.errors import DataError, SpecError, did_you_mean, shown
from lingrad.files.reading import read_json
from lingrad.research.execution import PLAN, read_claim
from lingrad.research.plan import PlanEntry, ResearchPlan, make_plan
from lingrad.research.record import RESULT, damaged, is_number, read_lines
from lingrad.research.search import PRUNED
from lingrad.research.statistics import Mean, PairedDifference, mean_of, paired
from lingrad.research.training import METRICS, OF_EACH_STEP

POINTS = 200  # of a curve, at most
MEASURES = {  # of a run, by name: where its record has it
    "state MB": ("state_bytes", 1e-6),
    "gradients MB": ("gradient_bytes", 1e-6),
    "gradients between refreshes MB": ("gradient_bytes_median", 1e-6),
    "peak MB": ("simulated_peak_bytes", 1e-6),
    "saved activations MB": ("saved_activation_bytes", 1e-6),
    "seconds": ("train_time", 1.0),
    "refresh seconds": ("refresh_time", 1.0),
    "ms/step": ("step_time_median", 1e3),
    "tokens/s": ("tokens_per_second", 1.0),
    "steps": ("steps", 1.0),
}


@dataclass(frozen=True)
class RunResult:
    """A run.

    Args:
        entry: The entry's name.
        final: Whether it is a final run.
        seed: Its seed.
        values: What it tried.
        info: ``train_info`` of its record.
        error: The message of a failure.
        curve: (step, training loss), thinned.
        measured: Name -> (step, number), of what its diagnostics have measured.
    """

    entry: str
    final: bool
    seed: int
    values: Mapping[str, Any]
    info: Mapping[str, Any]
    error: str
    curve: Sequence[tuple[int, float]]
    measured: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def failed(self) -> bool:
        """Whether it has no value of a whole run."""
        return bool(self.info["status"] != "success")

    @property
    def pruned(self) -> bool:
        """Whether it was stopped at a rung; its metric is the one there."""
        return bool(self.info["status"] == PRUNED)


@dataclass(frozen=True)
class Summary:
    """What became of an entry.

    Args:
        entry: The entry.
        trials: Its trials.
        finals: Its final runs.
        metrics: Metric or measure -> its mean over the final runs that have a value.
        difference: From the plan's first entry, seed by seed; None of itself, or where no seed has both.
        best: What the best trial tried.
        at_edge: Of these the options whose best value is the least or largest that was tried.
        missing: Of how many trials and final runs there is no record.
    """

    entry: PlanEntry
    trials: Sequence[RunResult]
    finals: Sequence[RunResult]
    metrics: Mapping[str, Mean]
    difference: PairedDifference | None
    best: Mapping[str, Any]
    at_edge: Sequence[str]
    missing: int


def read_results(folders: Sequence[Path], files: Path | None = None) -> tuple[ResearchPlan, list[RunResult]]:
    """Read the runs of a plan.

    Args:
        folders: Folders of its results; where several machines shared the trials, of all of them. A run of which two have a
            record counts once.
        files: Where the files that the plan names are now; None is where they were.

    Returns:
        The plan and its runs, in the order of entries, trials and seeds.

    Raises:
        DataError: A folder holds no results, or those of another plan; or a record is damaged.
    """
    plan: ResearchPlan | None = None
    runs: dict[tuple[str, str], RunResult] = {}
    for folder in folders:
        if not (folder / PLAN).is_file():
            raise DataError(
                f"{folder} holds no results of a plan: there is no {PLAN}. `lingrad run PLAN.toml --out "
                f"{quote(str(folder))}` makes some"
            )
        kept = read_claim(folder / PLAN)
        where = Path(kept["folder"]) if files is None else files
        found = make_plan(kept["content"], str(folder / PLAN), where, quick=kept["quick"])
        if plan is not None and plan.digest != found.digest:
            raise DataError(f"{folder} holds the results of another plan than {folders[0]}")
        plan, names = found, {entry.name for entry in found.entries}
        for path in sorted(folder.glob(f"runs/*/*/{RESULT}")):
            run = _read(path, found.task.metric, names)
            runs.setdefault((run.entry, path.parent.name), run)
    if plan is None:
        raise DataError("no folder was given")
    order = {entry.name: i for i, entry in enumerate(plan.entries)}
    return plan, sorted(runs.values(), key=lambda run: (order[run.entry], run.final, run.seed))


def against(plan: ResearchPlan, name: str) -> ResearchPlan:
    """A plan whose first entry, which the others are compared with, is another.

    Args:
        plan: The plan.
        name: The entry's name.

    Returns:
        The plan, its other entries in their order.

    Raises:
        SpecError: There is no such entry.
    """
    names = [entry.name for entry in plan.entries]
    if name not in names:
        raise SpecError(f"there is no entry '{name}' to compare with{did_you_mean(name, names)} Known: {', '.join(names)}")
    return replace(plan, entries=tuple(sorted(plan.entries, key=lambda entry: entry.name != name)))


def summarize(plan: ResearchPlan, runs: Sequence[RunResult]) -> list[Summary]:
    """Sum up by entry.

    Args:
        plan: The plan.
        runs: Its runs.

    Returns:
        A summary for each entry, in the plan's order.
    """
    metric = plan.task.metric
    first = {
        run.seed: run.info["metrics"][metric]
        for run in runs
        if run.final and not run.failed and run.entry == plan.entries[0].name
    }
    found = []
    for entry in plan.entries:
        own = [run for run in runs if run.entry == entry.name]
        finals = [run for run in own if run.final]
        good = [run for run in finals if not run.failed]
        means = {
            name: mean_of([_number(run.info.get(key)) * factor for run in good]) for name, (key, factor) in MEASURES.items()
        }
        names = dict.fromkeys(name for run in good for name in run.info["metrics"])
        means |= {name: mean_of([_number(run.info["metrics"].get(name)) for run in good]) for name in names}
        both = [run for run in good if run.seed in first]
        apart = None
        if both and entry is not plan.entries[0]:
            apart = paired([run.info["metrics"][metric] for run in both], [first[run.seed] for run in both])
        best = next((run.values for run in finals), {})
        trials = [run for run in own if not run.final]
        edges = [key for key in entry.space if key in best and _at_edge(best[key], [run.values.get(key) for run in trials])]
        tried = any(not run.failed for run in trials)
        chosen = tried or bool(finals) or plan.trials == 0
        missing = max(0, plan.trials - len(trials)) + (len(plan.seeds) - len(finals)) * chosen
        found.append(Summary(entry, trials, finals, means if good else {}, apart, best, edges, missing))
    return found


def check_measure(found: Sequence[Summary], name: str) -> None:
    """Make sure that some run logs a metric or measure.

    Args:
        found: The entries.
        name: Its name.

    Raises:
        SpecError: None does.
    """
    known = dict.fromkeys([name for one in found for name in one.metrics] + list(MEASURES))
    if any(one.metrics for one in found) and name not in known:
        raise SpecError(f"no run logs '{name}'{did_you_mean(name, known)} Logged: {', '.join(known)}")


def measure(summary: Summary, name: str) -> Mean:
    """A metric or measure of an entry: its mean, of nothing where all runs failed."""
    return summary.metrics.get(name, mean_of([]))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _at_edge(value: Any, tried: Sequence[Any]) -> bool:
    """Whether a value is the least or the largest number that was tried, so that a better one may lie beyond it."""
    numbers = {item for item in tried if isinstance(item, int | float) and not isinstance(item, bool)}
    return len(numbers) > 1 and value in (min(numbers), max(numbers))


def _read(path: Path, metric: str, entries: Collection[str]) -> RunResult:
    try:
        record = read_json(path)
        job, info, message = record["run_info"]["job"], record["train_info"], record["run_info"]["error_msg"]
        metrics = info["metrics"]
        for value, kind in ((job["seed"], int), (job["values"], dict), (info["status"], str), (metrics, dict), (message, str)):
            if type(value) is not kind:
                raise TypeError(f"{shown(value)} where {kind.__name__} was expected")
        for value in (*metrics.values(), *(info.get(key) for key, _ in MEASURES.values())):
            if not is_number(value):
                raise TypeError(f"{shown(value)} where a number was expected")
        if info["status"] == "success":
            float(metrics[metric])
        if job["entry"] not in entries:
            raise ValueError(f"the plan has no entry {shown(job['entry'])}")
        curve, measured = _curves(path.parent / METRICS)
        return RunResult(job["entry"], job["part"] == "final", job["seed"], job["values"], info, message, curve, measured)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise damaged(path, error) from error


def _curves(path: Path) -> tuple[list[tuple[int, float]], dict[str, list[tuple[int, float]]]]:
    lines = read_lines(path)
    finite = [line for line in lines if line["loss"] is not None]
    every = max(1, len(finite) // POINTS)
    curve = [(line["step"], line["loss"]) for i, line in enumerate(finite) if i % every == 0 or i == len(finite) - 1]
    measured: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name in line.keys() - set(OF_EACH_STEP):
            if line[name] is not None:
                measured.setdefault(name, []).append((line["step"], line[name]))
    return curve, {name: measured[name] for name in sorted(measured)}


def diagnosis(summary: Summary, name: str) -> tuple[Mean, Mean]:
    """What a diagnostic has measured in the final runs of an entry.

    Args:
        summary: The entry.
        name: What was measured.

    Returns:
        The mean, over the runs, of their last number, and of the mean of their numbers; of nothing where none was measured.
    """
    series = [run.measured[name] for run in summary.finals if not run.failed and name in run.measured]
    last = mean_of([points[-1][1] for points in series])
    return last, mean_of([sum(value for _, value in points) / len(points) for points in series])


def diagnosed(found: Sequence[Summary]) -> list[str]:
    """The names of all that the diagnostics of some final runs have measured."""
    return sorted({name for one in found for run in one.finals if not run.failed for name in run.measured})
