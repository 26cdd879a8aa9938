"""The report of a plan: Markdown, pictures, and a page that needs nothing but itself."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lingrad.console import markdown
from lingrad.files.atomic import write_whole
from lingrad.research import pictures
from lingrad.research.plan import ResearchPlan
from lingrad.research.results import (
    MEASURES,
    RunResult,
    Summary,
    check_measure,
    diagnosed,
    diagnosis,
    measure,
    summarize,
)
from lingrad.research.statistics import RULE, Mean

COLUMNS = ("state MB", "gradients MB", "peak MB", "ms/step", "seconds", "steps")  # of measures
USUALLY = {"gradients MB": "gradients between refreshes MB"}  # the same measure of most steps


def write_report(plan: ResearchPlan, runs: Sequence[RunResult], out: Path, *, x: str = "state MB", y: str = "") -> list[Path]:
    """Write the report.

    Args:
        plan: The plan.
        runs: Its runs.
        out: The folder.
        x: What the second picture is drawn over: a metric or one of `MEASURES`.
        y: What is drawn; the task's metric if empty.

    Returns:
        The files.

    Raises:
        SpecError: Nobody logs one of them.
    """
    found, y = summarize(plan, runs), y or plan.task.metric
    for name in {x, y}:
        check_measure(found, name)
    parts = {
        "report.md": as_markdown(plan, found).encode(),
        "report.json": (json.dumps(as_data(plan, found), indent=1) + "\n").encode(),
        "report.html": as_html(plan, found).encode(),
        "curves.png": pictures.curves(found),
        "sensitivity.png": pictures.sensitivity(plan, found),
        "pareto.png": pictures.pareto(found, x, y),
        "diagnostics.png": pictures.diagnostics(found),
    }
    return [write_whole(out / name, data) for name, data in parts.items() if data]


def as_markdown(plan: ResearchPlan, found: Sequence[Summary]) -> str:
    """The table, the failures, and the rule by which entries are said to differ.

    Args:
        plan: The plan.
        found: Its entries.

    Returns:
        Markdown.
    """
    failures = [f"- {text}" for one in found for text in _failures(one)]
    text = [
        f"# {plan.name}",
        "",
        f"{_searched(plan)}{f' {RULE}' * (len(plan.seeds) > 1)}",
        "",
        results_table(plan, found),
        *_ways(plan),
    ]
    if plan.match is not None:
        text += [_matched(plan, found), ""]
    if any(one.missing for one in found):
        lost = ", ".join(f"{one.entry.name} ({one.missing})" for one in found if one.missing)
        text += [
            f"Runs without a record here: {lost}. They were not made yet, or by another machine: give the folders of all.",
            "",
        ]
    if any(one.at_edge for one in found):
        text += ["*(edge)*: the best value is the least or largest that was tried, so that a better one may lie beyond it.", ""]
    text += _diagnoses(found)
    pruned = [f"- {text}" for one in found for text in _pruned(plan, one)]
    if pruned:
        text += [
            "Pruned, stopped at a rung where others were better; each counts as one of its entry's trials:",
            "",
            *pruned,
            "",
        ]
    return "\n".join([*text, *(["Failures:", "", *failures, ""] if failures else [])])


def results_table(plan: ResearchPlan, found: Sequence[Summary]) -> str:
    """The table of the final runs; a column in which nothing stands is left out.

    Args:
        plan: The plan.
        found: Its entries.

    Returns:
        Markdown.
    """
    first = plan.entries[0].name
    lines: list[tuple[str, ...]] = [("entry", plan.task.metric, f"less that of {first}", "best values", *COLUMNS, "n")]
    for one in found:
        own, apart = one.metrics.get(plan.task.metric), one.difference
        between = (
            "" if apart is None or math.isnan(apart.low) else f" [{apart.low:.4g}, {apart.high:.4g}]{' *' * apart.different}"
        )
        less = "" if apart is None else f"{apart.mean.value:+.4g}{between}"
        best = ", ".join(f"{key}={_short(value)}{' (edge)' * (key in one.at_edge)}" for key, value in one.best.items())
        shown = _mean(own) if own is not None else "not here" if one.missing else "failed"
        lines.append((one.entry.name, shown, less, best, *(_cell(one, name) for name in COLUMNS), str(own.count if own else 0)))
    kept = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return markdown(list(zip(*kept, strict=True)))


def _ways(plan: ResearchPlan) -> list[str]:
    """How those entries train whose options are more than what their name and method say."""
    lines = []
    for entry in plan.entries:
        if entry.options or entry.dtype:
            own = [f"{key}={_short(value)}" for key, value in entry.options.items()] + [entry.dtype] * bool(entry.dtype)
            lines.append(f"- {entry.name}: `{entry.method or entry.baseline}`, {', '.join(own)}")
    return [*lines, ""] if lines else []


def _cell(one: Summary, name: str) -> str:
    """A measure of an entry; of gradients, what they take between refreshes, and the most."""
    value = measure(one, name)
    shown = _short(value.value) if value.count and not math.isnan(value.value) else ""
    usual = measure(one, USUALLY.get(name, "")).value
    return f"{_short(usual)} ({shown} at most)" if shown and usual < value.value else shown


def _searched(plan: ResearchPlan) -> str:
    """How the final runs came about."""
    seeds = f"seed{'s' * (len(plan.seeds) > 1)} {', '.join(map(str, plan.seeds))}"
    if plan.trials == 0:
        return f"Nothing is searched: every entry is run with {seeds}."
    return f"{plan.trials} trials of each entry with seed {plan.seed} ({plan.sampler}); the best is run with {seeds}."


def _matched(plan: ResearchPlan, found: Sequence[Summary]) -> str:
    """What final runs have equal, and who does not reach it."""
    if plan.match == "seconds":
        return f"Final runs take as many steps as fit into the time of {plan.match_entry}'s, by what steps took in trials."
    limit = next(measure(one, "state MB").value for one in found if one.entry.name == plan.match_entry)
    over = [one.entry.name for one in found if measure(one, "state MB").value > limit]
    told = f"Final runs have no more bytes of state than {plan.match_entry}'s, by the largest rank that fits."
    return told + (f" More, with no rank to set or none small enough: {', '.join(over)}." if over else "")


def _diagnoses(found: Sequence[Summary]) -> list[str]:
    """A table of what the diagnostics of the final runs have measured; nothing where there is none."""
    names = diagnosed(found)
    if not names:
        return []
    lines: list[tuple[str, ...]] = [("entry", *names)]
    for one in found:
        pairs = [diagnosis(one, name) for name in names]
        cells = [f"{last.value:.4g} ({mean.value:.4g})" if last.count else "" for last, mean in pairs]
        if any(cells):
            lines.append((one.entry.name, *cells))
    about = "Diagnostics of the final runs: the last number that was measured, in brackets the mean over the run."
    return [about, "", markdown(lines)]


def as_html(plan: ResearchPlan, found: Sequence[Summary]) -> str:
    """A page that needs no network: tables, and pictures that its own script draws.

    Args:
        plan: The plan.
        found: Its entries.

    Returns:
        HTML.
    """
    page = (files("lingrad.research") / "data" / "report.html").read_text()
    text = json.dumps(as_data(plan, found)).replace("<", "\\u003c")  # no text of a run ends the script
    return page.replace("@TITLE@", html.escape(plan.name)).replace("@DATA@", text)


def as_data(plan: ResearchPlan, found: Sequence[Summary]) -> dict[str, Any]:
    """All that a report shows, as plain values for JSON.

    Args:
        plan: The plan.
        found: Its entries.

    Returns:
        ``name``, ``metric`` and more of the plan, and ``entries``: of each its ``means`` (mean, standard error, n), its
        ``difference`` from the first one (mean, low, high, whether they differ), ``best``, ``failures``, ``trials``, ``curves``
        and ``diagnostics``.
    """
    return {
        "name": plan.name, "about": _searched(plan),
        "metric": plan.task.metric, "greater": plan.task.greater, "rule": RULE, "trials": plan.trials,
        "sampler": plan.sampler, "seeds": list(plan.seeds), "first": plan.entries[0].name,
        "measures": list(dict.fromkeys([plan.task.metric, *(name for one in found for name in one.metrics), *MEASURES])),
        "diagnostics": diagnosed(found),
        "entries": [_plain(plan, one) for one in found],
    }  # fmt: skip


def _plain(plan: ResearchPlan, one: Summary) -> dict[str, Any]:
    apart = one.difference
    return {
        "name": one.entry.name,
        "method": one.entry.method or one.entry.baseline,
        "mode": "baseline, no dual" if one.entry.baseline else one.entry.mode,
        "means": {name: [_number(mean.value), _number(mean.error), mean.count] for name, mean in one.metrics.items()},
        "difference": None
        if apart is None
        else [_number(apart.mean.value), _number(apart.low), _number(apart.high), apart.different],
        "best": dict(one.best),
        "edge": list(one.at_edge),
        "failures": [*_failures(one), *(f"pruned: {text}" for text in _pruned(plan, one))],
        "trials": [
            {"values": dict(run.values), "metric": None if run.failed else _number(run.info["metrics"][plan.task.metric])}
            for run in one.trials
        ],
        "curves": [{"seed": run.seed, "points": list(run.curve)} for run in one.finals if not run.failed],
        "diagnostics": {
            name: [list(run.measured[name]) for run in one.finals if name in run.measured] for name in diagnosed([one])
        },
    }


def _pruned(plan: ResearchPlan, one: Summary) -> list[str]:
    found = [(run, run.info["metrics"].get(plan.task.metric)) for run in one.trials if run.pruned]
    return [
        f"{run.entry}, trial {dict(run.values)}: {plan.task.metric} {_short(value)} after {run.info['steps']} steps"
        for run, value in found
    ]


def _failures(one: Summary) -> list[str]:
    failed = [run for run in (*one.trials, *one.finals) if run.failed and not run.pruned]
    kinds = [f"seed {run.seed}" if run.final else "trial" for run in failed]
    return [
        f"{run.entry}, {kind} {dict(run.values)}: {run.info['status']}: {_last(run.error)}"
        for run, kind in zip(failed, kinds, strict=True)
    ]


def _last(error: str) -> str:
    """The last line of a message, in which Python says what the error is."""
    lines = error.strip().splitlines()
    return lines[-1][:300] if lines else ""


def _mean(mean: Mean) -> str:
    return _short(mean.value) if math.isnan(mean.error) else f"{mean.value:.4f} ± {mean.error:.4f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
