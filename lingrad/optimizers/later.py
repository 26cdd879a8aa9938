"""Bases that look at the parameter only from some step on: their counters of steps are moved forward, and they are followed.

A trial of a few steps does not come to the step at which a base averages, copies or rescales for the first time. What counts
its steps is found by its values, wherever a base keeps it: in the state, in the param groups or in attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lingrad.optimizers.reads import ParameterReads

# Among the steps after these are 60, 5040 and 10000: multiples of all small numbers, and of the round ones
JUMPS = (58, 5038, 9998)
_Place = tuple[MutableMapping[Any, Any], Any]


def reads_later(optimizer: Optimizer, params: Sequence[Tensor], gradients: Sequence[Tensor], reads: ParameterReads) -> str:
    """Have a base believe that it has made many steps, and follow the next three.

    Args:
        optimizer: The base, which has made no step.
        params: Its parameters, which `reads` follows.
        gradients: Of each parameter, of any step.
        reads: What was on while the base was built.

    Returns:
        What reads a parameter; empty if nothing does, or if the base fails so.
    """

    def step() -> None:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.clone()
        with reads.step():
            optimizer.step()

    try:
        step()
        first = dict(_numbers(optimizer))
        step()
        counters = [(place, value) for key, (place, value) in dict(_numbers(optimizer)).items() if _rose(first.get(key), value)]
        for jump in JUMPS if counters else ():
            for (holder, key), value in counters:
                _set(holder, key, value + jump - 2)
            for _ in range(3):  # a counter may be read before it is raised
                step()
    except Exception:  # of a base that keeps more than a number for each step
        return ""
    return reads.found


def _rose(before: tuple[_Place, float] | None, now: float) -> bool:
    return before is not None and now == before[1] + 1 and float(now).is_integer()


def _numbers(optimizer: Any) -> Iterator[tuple[tuple[Any, ...], tuple[_Place, float]]]:
    """The numbers that a base keeps, by where they are."""
    holders: list[tuple[Any, MutableMapping[Any, Any]]] = [((id(optimizer), "self"), vars(optimizer))]
    holders += [((id(optimizer), i), group) for i, group in enumerate(optimizer.param_groups)]
    holders += [((id(optimizer), id(param)), state) for param, state in optimizer.state.items() if isinstance(state, dict)]
    for at, holder in holders:
        for key, value in list(holder.items()):
            if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
                yield (*at, key), ((holder, key), float(value))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield (*at, key), ((holder, key), value)
            elif isinstance(value, Optimizer) and value is not optimizer:
                yield from _numbers(value)


@torch.no_grad()
def _set(holder: MutableMapping[Any, Any], key: Any, value: float) -> None:
    if isinstance(holder[key], Tensor):
        holder[key].fill_(value)
    else:
        holder[key] = type(holder[key])(value)
