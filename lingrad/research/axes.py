"""What a search may change: values, or a range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from lingrad.errors import SpecError, shown
from lingrad.research.schema import Table


@dataclass(frozen=True)
class Axis:
    """The values that one option may take.

    Args:
        values: They, where they are listed.
        low: The least of a range.
        high: The largest.
        log: Whether the range is one of logarithms.
        whole: Whether it is one of whole numbers.
    """

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @property
    def lowest(self) -> float | int:
        """The least of a range."""
        return int(self.low) if self.whole else self.low


Space = Mapping[str, Axis]


def read_space(table: Table) -> dict[str, Axis]:
    """Read a ``[space]``.

    Args:
        table: Option -> a list of values, or ``{low = 1e-4, high = 1e-1, log = true}``.

    Returns:
        Option -> axis, in the order of the table.

    Raises:
        SpecError: A value is neither, or a range is empty.
    """
    return {key: _axis(value, f"{table.where}, {key}", key) for key, value in table.rest().items()}


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations of listed values, the last option changing fastest.

    Args:
        space: The axes.

    Returns:
        Option -> value, for each combination.

    Raises:
        SpecError: An axis is a range.
    """
    for key, axis in space.items():
        if not axis.values:
            raise SpecError(
                f"a grid needs the values of '{key}' in a list, not a range; or take sampler = \"random\"", option=key
            )
    return [dict(zip(space, combination, strict=True)) for combination in product(*(axis.values for axis in space.values()))]


def _axis(value: Any, where: str, key: str) -> Axis:
    if isinstance(value, list):
        plain = all(isinstance(item, str | int | float | bool | None) for item in value)
        if not plain or any(isinstance(item, float) and not math.isfinite(item) for item in value):
            raise SpecError(f"{where}: values must be texts, finite numbers, true or false, not {shown(value)}", option=key)
        if not value or len({repr(item) for item in value}) != len(value):
            raise SpecError(f"{where} needs a list of different values, not {shown(value)}", option=key)
        return Axis(values=tuple(value))
    if not isinstance(value, Mapping):
        raise SpecError(
            f"{where} must be a list of values or a range such as {{low = 1e-4, high = 1e-1, log = true}}, not {shown(value)}",
            option=key,
        )
    table = Table(value, where)
    whole = type(value.get("low")) is type(value.get("high")) is int
    low, high, log = table.take("low", float), table.take("high", float), table.take("log", bool, False)
    table.end()
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not log)):
        raise SpecError(f"{where}: low must be below high, and above 0 where log = true; not {low:g} and {high:g}", option=key)
    return Axis(low=low, high=high, log=log, whole=whole)
