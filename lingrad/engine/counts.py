"""Steps counted for each parameter, as galore_torch does, where the run counts its own: those that a parameter has missed."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from torch import Tensor


def in_parts(groups: list[dict[str, Any]], missed: Mapping[Tensor, int]) -> Generator[int, None, None]:
    """Have an optimizer step first the parameters that have missed no step of the run, then those that have missed one, ...

    Close it where a step fails: the groups are whole again then.

    Args:
        groups: The optimizer's param groups; each holds only the parameters of a part until the next one.
        missed: Parameter -> steps of the run that it had no gradient in; a parameter that is absent has missed none.

    Yields:
        How many steps the parameters of a part have missed. Those without a gradient now make no part.
    """
    if not missed:  # as in every run that counts its own
        yield 0
        return
    whole = [group["params"] for group in groups]
    counts = sorted({missed.get(param, 0) for params in whole for param in params if param.grad is not None})
    if len(counts) < 2:
        yield counts[0] if counts else 0
        return
    try:
        for count in counts:
            for group, params in zip(groups, whole, strict=True):
                group["params"] = [param for param in params if missed.get(param, 0) == count]
            yield count
    finally:
        for group, params in zip(groups, whole, strict=True):
            group["params"] = params
