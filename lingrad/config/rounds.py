"""Rounds of a decentralised run: how often its workers exchange coordinates, and what they make of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lingrad.errors import require, require_one_of

Combine = Literal["sum", "mean"]
Sent = Literal["full", "bfloat16", "8bit"]  # how coordinates are sent
Kept = Literal["keep", "reset"]  # what a round's end does to moments


class Workers(ABC):
    """The workers of a decentralised run, as one of them knows them.

    Args:
        number: Which of them this is, from 0; no two have the same.

    Attributes:
        sent: Bytes that this worker has sent; those that it passes on in a ring are counted.
    """

    def __init__(self, number: int) -> None:
        require(type(number) is int and number >= 0, "number", f"number must be a worker's, from 0, not {number!r}")
        self.number = number
        self.sent = 0

    @abstractmethod
    def gather(self, give: Callable[[], Sequence[Tensor]]) -> Mapping[int, Sequence[Tensor]]:
        """What every worker gives in this exchange.

        Args:
            give: Gives this worker's tensors, of the same shapes and dtypes for all, which are not changed. It is asked again
                after `follow`'s ``load``.

        Returns:
            Number -> tensors on the devices of this worker's, its own among them where it took part; workers that have died or
            are late are missing. In the same order, with the same values, for all. Raises `ExchangeError` where two workers
            have one number, or give other tensors.
        """

    def follow(self, save: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]) -> None:  # noqa: B027
        """Know the run, for workers that join later or are left behind; nothing where the workers are a fixed set.

        Args:
            save: Gives what a worker that joins in this round needs: tensors and plain values only.
            load: Takes it, before `gather` returns.
        """


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How workers that train one model, each in its own slice, exchange what they have found.

    After ``every`` steps each worker sends its coordinates to the others, and all add the same change to their weights:
    W += lr (d + momentum b), with d the sum or the mean over workers k of S_k z_k, and b = momentum b + d. With lr = 1 and
    without momentum that is d itself; with momentum it is Nesterov's step as DiLoCo takes it (Douillard et al. 2023, arXiv
    2311.08105, section 2). Coordinates are zero after it. Parameters that train in full are replaced by their mean.

    Args:
        workers: The workers: see `lingrad.decentralized`.
        every: Steps of a round.
        combine: ``sum`` or ``mean`` of the workers' changes.
        moments: ``keep`` those of the base optimizer at the end of a round, or ``reset`` them; a change of bases does with
            them what the run's ``carry`` says.
        lr: Of the outer step.
        momentum: Of the outer step; above 0 a buffer as large as each weight is stored.
        send: ``full``, in the coordinates' dtype; or rounded to ``bfloat16``, or to ``8bit`` codes with a scale for each 256.
            The sender uses what it has sent, too.

    Raises:
        SpecError: An option is wrong.
    """

    workers: Workers
    every: int = 50
    combine: Combine = "sum"
    moments: Kept = "keep"
    lr: float = 1.0
    momentum: float = 0.0
    send: Sent = "full"

    def __post_init__(self) -> None:
        """Check the options."""
        require(
            isinstance(self.workers, Workers),
            "workers",
            f"workers must be one of lingrad.decentralized's, such as ProcessWorkers(), not {self.workers!r}",
        )
        require(
            type(self.every) is int and self.every >= 1,
            "every",
            f"every must be a number of steps, 1 or more, not {self.every!r}",
        )
        for option, words in (("combine", Combine), ("moments", Kept), ("send", Sent)):
            require_one_of(getattr(self, option), get_args(words), option)
        for option, below in (("lr", float("inf")), ("momentum", 1.0)):
            value = getattr(self, option)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < below
            require(fits, option, f"{option} of the outer step must be 0 or more and below {below}, not {value!r}")

    def terms(self) -> dict[str, Any]:
        """What workers must agree on, by option."""
        return {option: getattr(self, option) for option in ("every", "combine", "moments", "lr", "momentum", "send")}

    def outer(self, change: Tensor, momentum: Tensor | None) -> Tensor:
        """The outer step.

        Args:
            change: d [m, n].
            momentum: b [m, n], changed in place; None without momentum.

        Returns:
            What is added to the weight, [m, n].
        """
        if momentum is None:
            return change * self.lr
        momentum.mul_(self.momentum).add_(change)
        return torch.add(change, momentum, alpha=self.momentum).mul_(self.lr)
