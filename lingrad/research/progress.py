"""How far a plan is: runs done, the best of them, and about how long the others will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from lingrad.research.plan import PlanEntry, ResearchPlan
from lingrad.research.search import Trials


def runs_done(searches: Sequence[Trials], finals: Mapping[str, Trials | None]) -> int:
    """How many trials and final runs have ended.

    Args:
        searches: The trials of each entry.
        finals: The final runs of those whose search has ended.

    Returns:
        Their number.
    """
    return sum(len(trials.outcomes()) for trials in (*searches, *finals.values()) if trials is not None)


def note(plan: ResearchPlan, searches: Sequence[Trials], finals: Mapping[str, Trials | None], *, left: int, jobs: int) -> str:
    """The best trial so far, and the time left.

    Args:
        plan: The plan.
        searches: The trials of each entry.
        finals: The final runs of those whose search has ended.
        left: Runs that have not ended.
        jobs: Runs at a time.

    Returns:
        A line.
    """
    every = [trials for trials in (*searches, *finals.values()) if trials is not None]
    took = [one.measured["took"] for trials in every for one in trials.outcomes() if "took" in one.measured]
    time = time_left(took, left, jobs)
    ended = searches if plan.trials else [trials for trials in finals.values() if trials is not None]
    return f"{_best(plan, ended)}{', ' * bool(time)}{time}"


def time_left(took: Sequence[float], left: int, jobs: int) -> str:
    """About how long the runs that are left will take: the median of those that have ended, for each, over those at a time.

    Args:
        took: Seconds that each run took that has ended.
        left: Runs that have not ended.
        jobs: Runs at a time.

    Returns:
        A phrase; empty where no run has ended, or none is left.
    """
    if not took or not left:
        return ""
    seconds = median(took) * left / jobs
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


def _best(plan: ResearchPlan, searches: Sequence[Trials]) -> str:
    found: list[tuple[float, PlanEntry]] = []
    for search in searches:
        best = search.chosen(greater=plan.task.greater)
        if best is not None and best.value is not None:
            found.append((best.value, search.entry))
    if not found:
        return f"no {'trial' if plan.trials else 'run'} has a value yet"
    value, entry = (max if plan.task.greater else min)(found, key=lambda pair: pair[0])
    return f"best {plan.task.metric} so far {value:.4g} ({entry.name})"
