"""A rank for each weight under one budget of memory: where a column captures the most of a gradient for its bytes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import fields, replace
from glob import escape
from typing import Any

import torch
from torch import nn

from lingrad import optimizers
from lingrad.config import spec
from lingrad.config.rules import FROZEN, Rules, parse_rules
from lingrad.config.settings import Settings
from lingrad.config.targets import Target, resolve_model
from lingrad.errors import ModeError, SpecError, require
from lingrad.transforms.base import Transform
from lingrad.transforms.experts import Experts
from lingrad.transforms.linalg import squared_singular_values


def ranks_by_energy(
    model: nn.Module,
    rules: Rules,
    base: optimizers.BaseLike = "adamw",
    *,
    mean_rank: int,
    least: int = 1,
    most: int | None = None,
    **options: Any,
) -> dict[str, str]:
    """Give each weight a rank of its own, for the memory that one rank for all of them takes.

    What is maximised is the sum over weights of the share of |G|_F^2 that the r leading singular vectors capture, each weight's
    relative to its own gradient: the steps of Adam and its like do not grow with the gradient, so that a weight with small
    gradients is moved as far as the others. Columns are given out one at a time, each to the weight where it adds the most per
    byte (a greedy knapsack). Singular values fall, and no column costs less than the one before, but for the first ones where
    moments are in 8 bits. So the result is the best for the bytes it spends as long as the next column fits. One that does not
    fit is passed over: the sum is then below the best by less than the share of that column. Where every column of every weight
    costs the same it is the best.

    Args:
        model: The plain model, before `lingrad.wrap`, whose parameters hold the gradients (``.grad``) of one or more backward
            passes. A weight whose gradient is zero gets the least rank.
        rules: As for `lingrad.wrap`, except for names of methods: the transforms, whose ranks are replaced.
        base: The base optimizer, whose state is a part of the cost; as for `lingrad.wrap`.
        mean_rank: The budget: bytes of bases, and of the base's state of the coordinates, that this rank for all weights would
            take, or min(m, n) where that is smaller. Bytes are those of `lingrad.memory.estimate`.
        least: The lowest rank of any weight.
        most: The highest rank of any weight; None is min(m, n).
        **options: Options of the base, such as ``moments``, and of the run, which change nothing.

    Returns:
        Rules for `lingrad.wrap` and `lingrad.adapt`: parameter name -> config string; and ``frozen`` and ``none`` for the
        parameters of which ``rules`` say so.

    Raises:
        SpecError: A rule or option is wrong, a transform has no rank, or the budget is below ``least`` columns everywhere.
        ModeError: A weight has no gradient, or one that is not finite.
    """
    require(isinstance(model, nn.Module), "model", f"expected a model, not a {type(model).__name__}")
    for name, value in (("mean_rank", mean_rank), ("least", least), ("most", most)):
        known = (name == "most" and value is None) or (type(value) is int and value >= 1)
        require(known, name, f"{name} must be a whole number, 1 or more, not {value!r}")
    require(
        most is None or most >= least, "most", f"most={most} is below least={least}; give most {least} or more, or leave it out"
    )
    settings, base_options = Settings.split(options)
    require(
        settings.share is None,
        "share",
        "share='input' gives several weights one basis, which has one rank; leave share out, here and in the run",
    )
    found = optimizers.find(base, base_options, decay=False, others=Settings.names())
    plan = resolve_model(model, _ones(rules))
    costs: dict[object, dict[int, int]] = {}
    weights = [_Weight(target, found, costs) for target in plan.targets]
    budget = sum(weight.cost(min(mean_rank, weight.full)) for weight in weights)
    start = [min(least, weight.full) for weight in weights]
    left = budget - sum(weight.cost(rank) for weight, rank in zip(weights, start, strict=True))
    require(
        left >= 0,
        "mean_rank",
        f"the budget of mean_rank={mean_rank} is {budget:,} bytes of bases and optimizer state, {-left:,} too few for rank "
        f"{least} of every weight; raise mean_rank, or lower least",
    )
    ranks = _give_out([weight.offer(most) for weight in weights], start, left)
    chosen = {weight.target.name: spec.format(weight.ranked(rank)) for weight, rank in zip(weights, ranks, strict=True)}
    chosen |= {name: FROZEN.value for name, _ in plan.frozen} | dict.fromkeys(plan.none, "none")
    return {escape(name): text for name, text in chosen.items()}


# Of a weight with so many columns, the share that the next one captures and the bytes it takes; None where there is no next.
_Offer = Callable[[int], tuple[float, int] | None]


def _give_out(offers: list[_Offer], start: list[int], left: int) -> list[int]:
    """Ranks, from those at the start, for so many bytes more: always the column that captures the most per byte."""
    ranks = list(start)
    heap: list[tuple[float, int]] = []

    def push(i: int) -> None:
        found = offers[i](ranks[i])
        if found is not None and found[0] > 0:
            heapq.heappush(heap, (-found[0] / found[1] if found[1] > 0 else -float("inf"), i))

    for i in range(len(offers)):
        push(i)
    while heap:
        _, i = heapq.heappop(heap)
        found = offers[i](ranks[i])
        if found is not None and found[1] <= left:  # a column that does not fit is the last of its weight
            left -= found[1]
            ranks[i] += 1
            push(i)
    return ranks


class _Weight:
    """A weight, what the columns of its basis capture and what they cost.

    Args:
        target: The weight with its transform.
        base: The base of its coordinates.
        costs: What is known of bytes already, of all weights: layers are alike, and some bases are run to find it out.
    """

    def __init__(self, target: Target, base: optimizers.Base, costs: dict[object, dict[int, int]]) -> None:
        self.target, self.base = target, base
        self.shape = target.layout.shape
        self.dtype = target.template.dtype
        transform = target.transform
        self.full = min(transform.one(self.shape) if isinstance(transform, Experts) else self.shape)
        self.ranked(1)  # of which it may complain
        self._costs = costs.setdefault((transform, self.shape, self.dtype), {})

    def ranked(self, rank: int) -> Transform:
        """Its transform with another rank."""
        found = _ranked(self.target.transform, rank)
        if found is None:
            raise SpecError(
                f"{self.target.name}: {self.target.transform.name} has no rank of its own to be chosen; give this weight a "
                "transform with the option rank, such as svd(rank=32), or none"
            )
        return found

    def cost(self, rank: int) -> int:
        """Bytes of its basis and of the base's state of its coordinates."""
        if rank not in self._costs:
            transform = self.ranked(rank)
            coords, wide = transform.coords_shape(self.shape), torch.promote_types(self.dtype, torch.float32)
            kept = [*transform.storage(self.shape, self.dtype), *self.base.moments(coords, wide)]
            if transform.rule is not None:
                kept += transform.rule.storage(coords, self.dtype)
            self._costs[rank] = sum(tensor.nbytes for tensor in kept)
        return self._costs[rank]

    def offer(self, most: int | None) -> _Offer:
        """What its next column captures and costs."""
        shares = self._shares()
        limit = self.full if most is None else min(most, self.full)

        def next_column(rank: int) -> tuple[float, int] | None:
            return (shares[rank], self.cost(rank + 1) - self.cost(rank)) if rank < limit else None

        return next_column

    def _shares(self) -> list[float]:
        """The share of |G|_F^2 that each singular vector captures, the largest first; of experts that of all together."""
        name, grad = self.target.name, self.target.param.grad
        if grad is None or self.target.route == "packed":
            raise ModeError(
                f"{name} has no gradient"
                + (
                    ", as weights in 4 or 8 bits have none; leave it out here, and add a rule for it to the result"
                    if self.target.route == "packed"
                    else "; run forward and backward of some batches on the plain model first, before lingrad.wrap"
                )
            )
        squares = squared_singular_values(self.target.layout.matrix(grad.detach()), self.target.transform.blocks)
        if not bool(squares.isfinite().all()):
            raise ModeError(f"the gradient of {name} is not finite; take the gradients of other batches")
        found = torch.finfo(squares.dtype)
        shares = squares / squares.sum().clamp_min(found.tiny)
        kept: list[float] = shares.where(shares > found.eps * len(shares), 0.0).tolist()  # the rest is rounding
        return kept


def _ones(rules: Rules) -> Rules:
    """Rules with rank 1 in place of all that they say, which need not fit the weights."""
    parsed = parse_rules(rules)
    if isinstance(parsed, Transform):
        return _ranked(parsed, 1) or parsed
    return {glob: (_ranked(rule, 1) or rule) if isinstance(rule, Transform) else rule for glob, rule in parsed.items()}


def _ranked(transform: Transform, rank: int) -> Transform | None:
    own: dict[str, Any] = {option.name: getattr(transform, option.name) for option in fields(transform)}
    if "rank" in own:
        return replace(transform, rank=rank)  # type: ignore[call-arg]
    inner = _ranked(own["each"], rank) if isinstance(own.get("each"), Transform) else None
    return None if inner is None else replace(transform, each=inner)  # type: ignore[call-arg]
