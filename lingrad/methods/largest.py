"""Search for the largest number that fits, of rows of a batch or of a rank."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], most: int, *, start: int = 2) -> int:
    """The largest whole number that fits, if all smaller ones do: doubled until one does not, then by bisection.

    Args:
        fits: Whether a number fits. It is not asked about 1.
        most: No larger number is tried.
        start: The first number that is tried, 2 or more.

    Returns:
        A number from 1 to ``most``.
    """
    low, high = 1, max(2, start)
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
