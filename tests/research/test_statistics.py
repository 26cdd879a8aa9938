"""Means, errors and intervals: those of scipy on the same numbers."""

import math

import numpy as np
import pytest

from lingrad.research.statistics import mean_of, paired

stats = pytest.importorskip("scipy.stats", reason="make test installs it")
FIRST, SECOND = [2.5, 2.7, 2.4, 2.6, 2.8, 2.3], [2.2, 2.5, 2.3, 2.1, 2.9, 2.0]


@pytest.mark.parametrize("values", [FIRST, SECOND, FIRST[:3], FIRST[:2]])
def test_mean_and_standard_error(values):
    found = mean_of(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-15)
    assert found.error == pytest.approx(stats.sem(values), abs=1e-15)
    assert found.count == len(values)


def test_too_few_values():
    assert math.isnan(mean_of([]).value)
    assert math.isnan(mean_of([1.0]).error)
    assert not paired([1.0], [0.0]).different


@pytest.mark.parametrize("count", [3, 4, 6])
def test_the_interval_is_the_percentile_bootstrap(count):
    """Two draws of 10,000 resamples: their quantiles differ by a few per cent of the interval."""
    found = paired(FIRST[:count], SECOND[:count])
    apart = np.subtract(FIRST[:count], SECOND[:count])
    theirs = stats.bootstrap((apart,), np.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    width = theirs.high - theirs.low
    assert found.mean.value == pytest.approx(apart.mean(), abs=1e-15)
    assert abs(found.low - theirs.low) < 0.05 * width
    assert abs(found.high - theirs.high) < 0.05 * width
    assert found.different == (not theirs.low <= 0 <= theirs.high)


def test_what_is_said_to_differ():
    assert paired([1.0, 1.1, 1.2], [0.0, 0.0, 0.0]).different
    assert not paired([1.0, -1.0, 0.5], [0.0, 0.0, 0.0]).different
    assert not paired([1.0, 1.1], [0.0, 0.0]).different  # of two pairs nothing is said
    assert paired([1.0, 1.1, 1.2], [0.0, 0.0, 0.0]) == paired([1.0, 1.1, 1.2], [0.0, 0.0, 0.0])
