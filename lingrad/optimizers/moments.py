"""What a base's state consists of, found by a dry run: means of gradients, means of their squares, a count of steps.

A refresh that carries moments over into another basis must know it of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import DualityError
from lingrad.optimizers.base import Base
from lingrad.optimizers.checks import SHAPE, dry_run, first_run

STEPS = 3


@dataclass(frozen=True)
class MomentKinds:
    """What the entries of a base's state are.

    Args:
        degrees: The degree in the gradient of every entry that has the parameter's shape: 1 for means, 2 for squares.
        counter: The entry that counts steps; None if there is none.
    """

    degrees: Mapping[str, int]
    counter: str | None


def moment_kinds(base: Base, option: str = "carry='rotate'", verb: str = "rotate") -> MomentKinds:
    """Find what the entries of a base's state are.

    Args:
        base: The base to test.
        option: The option of a run that must know them, for the message.
        verb: What it does with them, for the message.

    Returns:
        The kinds.

    Raises:
        DualityError: An entry is neither a mean of gradients nor of squares, so that it cannot be taken to another basis.
    """
    base = base.unquantised
    remedy = "carry='keep' or carry='reset'" if option.startswith("carry") else "another base"
    _, dtype, _ = first_run(base)
    once, twice, negated = (dry_run(base, [SHAPE], dtype, steps=STEPS, factor=factor).state for factor in (1.0, 2.0, -1.0))
    degrees, counter = {}, None
    for key, value in once.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            counts = isinstance(value, int | float | Tensor) and float(value) == STEPS
            counter = key if counts and counter is None else counter
            continue
        # the largest gradient so far (Adamax) doubles with it too, and is no mean: it has no sign
        signs = {1: -1.0, 2: 1.0}
        degree = next((d for d in (1, 2) if _grew(value, twice[key], 2.0**d) and _grew(value, negated[key], signs[d])), None)
        if value.shape != SHAPE or degree is None:
            raise DualityError(
                f"{option} cannot {verb} the state '{key}' of base '{base.name}' (it is quantised, factored or "
                f"not a moment of the gradient); use {remedy}"
            )
        degrees[key] = degree
    return MomentKinds(degrees, counter)


def require_transportable(base: Base, kinds: MomentKinds) -> None:
    """Make sure that ``carry="transport"`` knows what it needs of a base.

    Args:
        base: The base.
        kinds: What its entries are.

    Raises:
        DualityError: It has several means, so that it is not known to which the squares belong; or it does not count steps.
    """
    rates = decay_rates(base, kinds, {})
    means = [key for key in rates if kinds.degrees[key] == 1]
    if len(rates) == len(means):
        return
    why = "" if kinds.counter or not means else "it does not count its steps"
    if len(means) > 1:
        why = f"it has several means of gradients ({', '.join(means)})"
    if why:
        raise DualityError(
            f"carry='transport' cannot estimate the squares of base '{base.name}' in another basis: {why}; use carry='rotate', "
            "'keep' or 'reset'"
        )


def decay_rates(base: Base, kinds: MomentKinds, group: Mapping[str, Any]) -> dict[str, float]:
    """How fast the means of a base forget: b of m <- b m + (1 - b) g, which sums to weights of 1 - b^k after k steps.

    Args:
        base: The base.
        kinds: What its entries are.
        group: Hyper-parameters of a param group, which replace the base's own.

    Returns:
        Entry -> b, for every entry that is such a mean and was zero at the start; a sum, as SGD's momentum, is none.
    """
    base = base.unquantised
    _, dtype, _ = first_run(base)
    first, third = (dry_run(base, [SHAPE], dtype, steps=steps, constant=True, group=group).state for steps in (1, STEPS))
    rates = {}
    for key in kinds.degrees:
        rate = 1.0 - float(first[key].flatten()[0])
        if abs(float(third[key].flatten()[0]) - (1.0 - rate**STEPS)) <= 1e-6 * (1.0 - rate):
            rates[key] = rate
    return rates


def steps_grow(base: Base) -> bool:
    """Whether a base's steps grow with the gradient, as SGD's do, and those of Adam, Lion and Muon do not.

    Args:
        base: The base to test.

    Returns:
        Whether a gradient four times as large makes a step more than twice as long.
    """
    base = base.unquantised
    shapes, dtype, _ = first_run(base)
    sizes = [dry_run(base, shapes, dtype, steps=STEPS, factor=factor).updates[0][-1].norm() for factor in (1.0, 4.0)]
    return float(sizes[1]) > 2.0 * float(sizes[0])


def _grew(once: Tensor, other: Tensor, factor: float) -> bool:
    return once.is_floating_point() and torch.allclose(other, factor * once, rtol=1e-3, atol=0.0)
