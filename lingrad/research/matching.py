"""Comparisons at equal bytes of state or equal time: what a final run has to keep to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from lingrad.methods.largest import largest
from lingrad.research.accounting import state_bytes
from lingrad.research.plan import PlanEntry, ResearchPlan
from lingrad.research.search import Trials
from lingrad.research.ways import make_method, rank_of


def matched(
    plan: ResearchPlan, entry: PlanEntry, finals: Mapping[str, Trials | None], trials: Sequence[float]
) -> dict[str, Any] | None:
    """What the final runs of an entry keep to.

    Args:
        plan: The plan.
        entry: The entry.
        finals: The final runs of each entry whose search has ended.
        trials: Seconds that a step took in each trial of this entry.

    Returns:
        ``values``, such as a rank, or ``steps``; empty where there is nothing to match; None where the entry that others are
        matched with has not ended yet.
    """
    if plan.match is None or entry.name == plan.match_entry:
        return {}
    reference = finals.get(plan.match_entry)
    if plan.match_entry not in finals:
        return None
    if reference is None:  # all its trials failed
        return {}
    if not reference.done:
        return None
    runs = [one.measured for one in reference.outcomes() if one.value is not None]
    if not runs:
        return {}
    own = finals[entry.name]
    if plan.match == "seconds":
        took = median(run["train_time"] for run in runs)
        return {"steps": max(2, round(took / median(trials)))} if trials else {}
    values = {} if own is None or own.best is None else own.best
    rank = rank_of(entry, values)
    if rank is None:
        return {}
    limit = max(run["state_bytes"] for run in runs)
    return {"values": {"rank": _largest(plan.of(entry), entry, values, limit, rank)}}


def _largest(plan: ResearchPlan, entry: PlanEntry, values: Mapping[str, Any], limit: float, rank: int) -> int:
    """The largest rank whose state, after a step, is no more than the limit; at least 1."""
    weights = [p.shape for p in plan.task.build(plan.seeds[0], getattr(torch, plan.dtype)).parameters() if p.dim() > 1]
    most = max((min(shape) for shape in weights), default=1)  # none is of a larger rank

    def fits(rank: int) -> bool:
        try:
            method = make_method(entry, {**values, "rank": rank}, seed=plan.seeds[0], folder=plan.folder)
            training = method.prepare(plan.task.build(plan.seeds[0], getattr(torch, plan.dtype)))
            batch = next(iter(plan.task.batches(1, plan.seeds[0])))
            plan.task.loss(training.model, batch).backward()
            training.step()
        except ValueError:  # larger than a weight
            return False
        return sum(state_bytes(one) for one in training.optimizers) <= limit

    return largest(fits, most, start=min(rank, most))
