"""Means, their errors, and whether two entries differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 10_000
LEVEL = 0.95
RULE = (
    f"Two entries are said to differ where the {LEVEL:.0%} bootstrap interval of their paired difference ({RESAMPLES:,} "
    "resamples of the seeds, percentiles) does not hold 0; of fewer than three pairs nothing is said."
)


@dataclass(frozen=True)
class Mean:
    """A mean.

    Args:
        value: The mean; NaN of nothing, or where a value is not finite.
        error: Its standard error; NaN of fewer than two values.
        count: Of how many values.
    """

    value: float
    error: float
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference of pairs.

    Args:
        mean: The mean difference.
        low: The lower end of its bootstrap interval.
        high: The upper end.
        different: Whether the entries are said to differ: see `RULE`.
    """

    mean: Mean
    low: float
    high: float
    different: bool


def mean_of(values: Sequence[float]) -> Mean:
    """A mean with its standard error, s / n^(1/2), s with n - 1.

    Args:
        values: The values.

    Returns:
        The mean.
    """
    if not values:
        return Mean(math.nan, math.nan, 0)
    if not all(map(math.isfinite, values)):
        return Mean(math.nan, math.nan, len(values))
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), error, len(values))


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedDifference:
    """The mean of ``first - second`` and its percentile bootstrap interval (Efron, Tibshirani, 1993, section 13.3).

    Args:
        first: Values, one for each seed.
        second: The other entry's, of the same seeds in the same order.
        seed: Of the resamples.

    Returns:
        The difference.
    """
    apart = torch.tensor([a - b for a, b in zip(first, second, strict=True)], dtype=torch.float64)
    mean = mean_of(apart.tolist())
    if len(apart) < 2:
        return PairedDifference(mean, math.nan, math.nan, different=False)
    drawn = torch.randint(len(apart), (RESAMPLES, len(apart)), generator=torch.Generator().manual_seed(seed))
    means = apart[drawn].mean(1)
    low, high = (float(means.quantile(q)) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return PairedDifference(mean, low, high, different=len(apart) > 2 and not low <= 0.0 <= high)
