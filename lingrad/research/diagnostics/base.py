"""What a diagnostic is, and what it sees of the run that it measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import DualityError
from lingrad.methods import Method, Training
from lingrad.optimizers.moments import moment_kinds
from lingrad.research.task import Task


class BasisChange(NamedTuple):
    """A refresh of one weight's basis.

    Args:
        sub: The weight's `lingrad.subspaces.subspace.Subspace`.
        old: The map before it.
        new: The map after it.
        first: Whether the old basis was the one of the start, which no gradient had chosen.
        means: The base's means of gradients, [p, q] each, in the old basis, where they were asked for.
        carry: What the refresh does to moments.
    """

    sub: Any
    old: Any
    new: Any
    first: bool
    means: Sequence[Tensor]
    carry: str


@dataclass
class ObservedRun:
    """A run that is measured.

    Args:
        task: What is trained.
        method: How.
        model: The model, as the task built it; the method may have wrapped it.
        training: The model that trains, and its optimizers.
        seed: The seed of everything random.
        steps: Steps of the run.
        dtype: Of the weights.
        device: Where it trains.
        factor: The factor on the learning rate after so many steps.

    Attributes:
        changes: The refreshes of the step that was made last, once `listen` was called.
    """

    task: Task
    method: Method
    model: nn.Module
    training: Training
    seed: int
    steps: int
    dtype: torch.dtype
    device: str
    factor: Callable[[int], float]
    changes: list[BasisChange] = field(default_factory=list, init=False)
    _keys: dict[int, tuple[str, ...]] = field(default_factory=dict, init=False)

    @cached_property
    def optimizers(self) -> list[SubspaceOptimizer]:
        """Lingrad's optimizers of the run; none where the method is a baseline."""
        return [one for one in self.training.optimizers if isinstance(one, SubspaceOptimizer)]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Compute something beside the run: torch's random state is afterwards what it was before."""
        devices = [torch.device(self.device)] if torch.device(self.device).type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    def marks(self, count: int) -> set[int]:
        """Steps, at most ``count`` of them and evenly spaced, of which the last is that of the run."""
        every = ceil(self.steps / count)
        return {step for step in range(1, self.steps + 1) if step % every == 0 or step == self.steps}

    def listen(self, *, means: bool = False) -> None:
        """Have `changes` hold the refreshes of each step.

        Args:
            means: Whether to copy the means of gradients, too, where the base has such.
        """
        for optimizer in self.optimizers:
            if means:
                self._keys[id(optimizer)] = _means_of(optimizer)
            for sub in optimizer.subspaces:
                sub.on_change = partial(self._changed, optimizer, sub)

    def _changed(self, optimizer: SubspaceOptimizer, sub: Any, old: Any, new: Any) -> None:
        first, keys = sub.basis.refreshes == 0, self._keys.get(id(optimizer), ())
        found: dict[str, Any] = {}
        if keys and not first:
            found = dict(optimizer.base.state.get(sub.coords, {}))
            quantizer = optimizer.base_of("coords").quantizer
            found = found if quantizer is None else dict(quantizer.decode(found))
        means = [found[key].detach().to(sub.coords.device, copy=True) for key in keys if key in found]
        self.changes.append(BasisChange(sub, old, new, first, means, optimizer.settings.carry))


class Diagnostic(ABC):
    """Measures something of a run, and changes nothing of it.

    Its methods are called with torch's random state forked, and their time does not count as the run's. A class of one's own
    takes no arguments. Whatever it keeps is of one run, and nothing of it is in a checkpoint.

    Attributes:
        run: The run, from `begin` on.
    """

    run: ObservedRun

    def begin(self, run: ObservedRun) -> None:
        """Called once, before the first step.

        Args:
            run: The run.
        """
        self.run = run

    def before(self, batch: Any) -> None:  # noqa: B027 - most have nothing to do here
        """Called before the forward of each step.

        Args:
            batch: What the step trains on, on the run's device; not to be changed.
        """

    @abstractmethod
    def after(self, step: int) -> Mapping[str, float]:
        """Called after each step.

        Args:
            step: Steps finished.

        Returns:
            Name -> number, for `metrics.jsonl` and the report; empty where nothing was measured.
        """


def average(values: Sequence[float]) -> float:
    """The mean of some values, one or more."""
    return sum(values) / len(values)


def _means_of(optimizer: SubspaceOptimizer) -> tuple[str, ...]:
    """The entries of the base's state that are means of gradients; none where some entry is no moment."""
    try:
        kinds = moment_kinds(optimizer.base_of("coords"))
    except DualityError:
        return ()
    return tuple(key for key, degree in kinds.degrees.items() if degree == 1)
