"""What the rule of a basis's ``schedule`` remembers, and in which steps it lets the basis be refreshed.

Steps are those of the basis's own clock, which is late where weights take turns. A basis that was not refreshed yet is due from
step 0 on until it is. Everything that decides is a number here, so that a checkpoint has it, and a run that resumes decides as
the one that was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import CheckpointError
from lingrad.maps import LinearMap
from lingrad.tensors import own
from lingrad.transforms import Probe, Transform
from lingrad.transforms.schedules import AdaptiveSchedule, OverlapSchedule


class Probes(NamedTuple):
    """The products that a refresh asks of the gradient.

    Args:
        learned: Those that the transform learns from.
        held_out: Test vectors of one or both sides, by which the new basis is judged.
    """

    learned: tuple[Probe, ...]
    held_out: tuple[Probe, ...]


class Proposal(NamedTuple):
    """A refresh that is chosen and not yet committed; its map is made anew where the state is in host memory."""

    state: Any
    map: LinearMap | None


class Schedule(NamedTuple):
    """What the next step means for a basis.

    Args:
        redraw: It must be drawn again before the step's forward.
        changes: A gradient that is left from before now would belong to another basis in the step.
    """

    redraw: bool
    changes: bool


class NextRefresh(NamedTuple):
    """When a basis is refreshed next, or its schedule decides on that.

    Args:
        step: Steps finished before the step.
        every: Steps between refreshes, or between checks, at present.
        certain: Whether it is refreshed then, given a gradient, and not only checked.
    """

    step: int
    every: int
    certain: bool


_NUMBERS = ("interval", "since", "streak", "wanted")  # in checkpoints too


class Cadence:
    """When a basis with a rule is refreshed.

    Args:
        rule: The rule.
        every: Steps between checks; of ``overlap`` the first interval.

    Attributes:
        interval: Steps between refreshes, which ``overlap`` doubles, or between checks.
        since: The step from which on intervals are counted.
        streak: Refreshes in a row after which the basis was much like the one before.
        wanted: The step in which a rule that adds up steps has decided to refresh; -1 before there was one.
        paths: Of such a rule, by weight: the sum of unit gradients, or the first of them, [p, q] as the coordinates are held;
            and [2], how many steps were counted, and the last distance from the first. Zero after each refresh.
    """

    def __init__(self, rule: AdaptiveSchedule, every: int) -> None:
        self.rule = rule
        self.every = every
        self.interval = every
        self.since = 0
        self.streak = 0
        self.wanted = -1
        self.paths: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, transform: Transform) -> Cadence | None:
        """That of a transform; None where it refreshes every so many steps."""
        return None if transform.rule is None else cls(transform.rule, transform.period)

    def due(self, clock: int, refreshes: int) -> bool:
        """Whether the step after ``clock`` finished ones may change the basis.

        Args:
            clock: Steps finished, 0 or more.
            refreshes: Refreshes so far.

        Returns:
            Whether it gathers what a refresh needs; for a rule that decides by the gradient that is each check.
        """
        if refreshes == 0:
            return True
        return self.wanted == clock if self.rule.decides == "steps" else self.acts(clock)

    def acts(self, clock: int) -> bool:
        """Whether there is a check or a refresh in the step after ``clock`` finished ones, of a basis that was refreshed."""
        return (clock - self.since) % self.interval == 0 and (clock > self.since or self.rule.decides != "bases")

    def wait(self, steps: int) -> None:
        """Begin ``steps`` steps before 0, in a basis that was chosen elsewhere.

        Args:
            steps: By how much the clock was set back.
        """
        self.since = -steps

    def refreshed(self, clock: int, overlap: float | None) -> None:
        """Note a refresh.

        Args:
            clock: Steps finished before it.
            overlap: |S_old^T S_new|^2 / r, where the rule decides by that and there was a basis before.
        """
        for tensors in self.paths.values():
            for tensor in tensors:
                own(tensor).zero_()
        if not isinstance(self.rule, OverlapSchedule):
            return
        self.streak = self.streak + 1 if overlap is not None and overlap >= self.rule.threshold else 0
        if self.streak >= self.rule.after:
            self.interval, self.streak = self.rule.longer(self.interval), 0
        self.since = clock // self.every * self.every  # late ones, for want of a gradient, do not shift those after

    def path(self, name: str, coords: Tensor) -> tuple[Tensor, Tensor]:
        """What steps of one weight have added up; zeros where there is nothing yet.

        Args:
            name: The weight's.
            coords: Its coordinates, for shape, dtype and device, and how they are spread over processes.

        Returns:
            [p, q] and [2], to be written into.
        """
        if name not in self.paths:
            like = coords.detach()
            zeros = torch.zeros_like(like, memory_format=torch.contiguous_format, requires_grad=False)
            self.paths[name] = zeros, own(like).new_zeros(2)
        total, numbers = self.paths[name]
        if own(total).device != own(coords).device:  # where model.to has moved the weight
            device = own(coords).device
            self.paths[name] = total, numbers = total.to(device), numbers.to(device)
        return total, numbers

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are kept between steps, of this process."""
        for total, numbers in self.paths.values():
            yield own(total)
            yield numbers

    def entries(self, name: str, coords: Tensor, *, first: bool) -> dict[str, Any]:
        """What a checkpoint holds of one weight, by name.

        Args:
            name: The weight's.
            coords: Its coordinates.
            first: Whether it is the first of those that use the basis, which has its numbers.

        Returns:
            Whole numbers, and tensors that are not copied.
        """
        found: dict[str, Any] = {key: getattr(self, key) for key in _NUMBERS} if first else {}
        if self.rule.decides == "steps":
            found |= zip(("path", "steps"), self.path(name, coords), strict=True)
        return found

    def check(self, entries: Mapping[str, Any], name: str) -> None:
        """Make sure that a run can have left the numbers of a checkpoint.

        Args:
            entries: As `entries` gives them.
            name: The weight's, for the message.

        Raises:
            CheckpointError: None can.
        """
        if not entries.keys() >= set(_NUMBERS):
            return
        interval, since, streak, wanted = (entries[key] for key in _NUMBERS)
        doubles = isinstance(self.rule, OverlapSchedule)
        times = interval // self.every
        fits = interval == times * self.every and times >= 1 and times & (times - 1) == 0 and (doubles or times == 1)
        fits = fits and since >= -self.every and since % self.every == 0
        if not fits or not 0 <= streak < max(getattr(self.rule, "after", 1), 1) or wanted < -1:
            found = ", ".join(f"{key}={entries[key]}" for key in _NUMBERS)
            raise CheckpointError(
                f"the schedule of {name} has {found} in the checkpoint, which no run of every={self.every} leaves; give an "
                "earlier checkpoint"
            )

    def load(self, entries: Mapping[str, Any], name: str, coords: Tensor) -> None:
        """Take over what a checkpoint holds of one weight; tensors in place, since a captured step goes on writing to them.

        Args:
            entries: As `entries` gives them.
            name: The weight's.
            coords: Its coordinates.
        """
        for key in _NUMBERS:
            setattr(self, key, entries.get(key, getattr(self, key)))
        if self.rule.decides == "steps":
            for key, tensor in zip(("path", "steps"), self.path(name, coords), strict=True):
                tensor.copy_(entries[key])
