"""Rules by which a basis is refreshed when it has become a bad one, and not every so many steps: the option ``schedule``.

A rule is options only, as a transform is. It decides at checks, every ``every`` steps of the transform; what it has to
remember between them is in `lingrad.subspaces.schedule`, and the figures that it decides by are computed in
`lingrad.engine.adaptive`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from typing_extensions import override

from lingrad.errors import SpecError, did_you_mean, require
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms import options

Measure = Literal["efficiency", "displacement"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveSchedule(ABC):
    """A rule that decides when a basis is refreshed. The first refresh is in the first step, whatever the rule."""

    name: ClassVar[str]  # the name in config strings

    def __post_init__(self) -> None:
        """Check every option against its annotation."""
        options.check(self)

    @property
    @abstractmethod
    def decides(self) -> Literal["gradient", "bases", "steps"]:
        """What a decision reads: the gradient of a check's step, two bases at a refresh, or what each step has added up."""

    def storage(self, coords: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        """What the rule keeps in memory for one weight.

        Args:
            coords: The shape of its coordinates.
            dtype: The weight's dtype.

        Returns:
            Shape and dtype of each tensor; none unless the rule adds something up at each step.
        """
        return []


@final
@dataclass(frozen=True, kw_only=True)
class EnergySchedule(AdaptiveSchedule):
    """At each check, refresh where the basis captures too little of the gradient, |S S^T G| / |G|.

    Both thresholds count; a threshold of 0 never refreshes. The energy is that of `lingrad.SubspaceOptimizer.captured_energy`:
    exact where one process reads the gradient, else estimated from test vectors that are drawn anew at each check.

    Args:
        fraction: Refresh below this fraction of the energy that the basis captured when it was chosen.
        least: Refresh below this energy.

    Raises:
        SpecError: A threshold is not in 0...1, or both are 0.
    """

    name = "energy"

    fraction: float = 0.8
    least: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for option in ("fraction", "least"):
            value = getattr(self, option)
            require(0 <= value <= 1, option, f"{option} must be in 0...1, not {value}")
        require(self.fraction > 0 or self.least > 0, "fraction", "with fraction=0 and least=0 there is no second refresh")

    @property
    @override
    def decides(self) -> Literal["gradient"]:
        return "gradient"

    def threshold(self, reference: float | None) -> float:
        """The energy below which the basis is refreshed.

        Args:
            reference: What it captured when it was chosen; None where that is not known, and any energy is too little.

        Returns:
            The larger of the two thresholds.
        """
        return float("inf") if reference is None else max(self.fraction * reference, self.least)


@final
@dataclass(frozen=True, kw_only=True)
class OverlapSchedule(AdaptiveSchedule):
    """Refresh less often where successive bases are alike: the interval of a basis, at first ``every``, doubles and doubles.

    It doubles after ``after`` refreshes in a row whose overlap with the basis before, |S_old^T S_new|^2 / r, is ``threshold``
    or more; the count then begins again. For orthonormal bases the overlap is 1 where both span the same space, and r / n for
    two random ones. The idea is Q-GaLore's (Zhang et al., 2024, arXiv 2407.08296), whose program compares the
    first column only, by its cosine, and asks for the mean of the last five.

    Args:
        threshold: The overlap from which on two bases count as alike.
        after: How many refreshes in a row.
        longest: Steps that the interval does not exceed; 0 sets no limit.

    Raises:
        SpecError: An option is out of range.
    """

    name = "overlap"

    threshold: float = 0.4
    after: int = 5
    longest: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(0 < self.threshold <= 1, "threshold", f"threshold must be over 0 and at most 1, not {self.threshold}")
        require(self.after >= 1, "after", f"after must be 1 or more, not {self.after}")
        require(self.longest >= 0, "longest", f"longest must be 0 (no limit) or more, not {self.longest}")

    @property
    @override
    def decides(self) -> Literal["bases"]:
        return "bases"

    def longer(self, interval: int) -> int:
        """Twice an interval, or the interval itself where that is too long."""
        return interval if self.longest and 2 * interval > self.longest else 2 * interval


@final
@dataclass(frozen=True, kw_only=True)
class PathSchedule(AdaptiveSchedule):
    """At each check, refresh where the steps in the basis lead nowhere, by the unit gradients d_i = S^T G_i / |S^T G_i|.

    Lotus (Miao et al., 2026, arXiv 2602.01233, section 3.1) has two figures of how far T steps have led.
    ``efficiency`` is |d_1 + ... + d_T| / T, its D_actual for steps of one length over the longest way that T such steps lead:
    1 where all gradients point one way, 0 where they cancel. ``displacement`` is |d_T - d_1| / T, of its algorithm 1.
    Steps without a gradient are not counted. Of weights that share a basis the figure is the root of the mean square.

    Args:
        threshold: Refresh below this; the paper gives 0.005 to 0.02 for ``displacement``, with a check every 25 to 100 steps.
        measure: Which of the two.

    Raises:
        SpecError: The threshold is not in 0...1.
    """

    name = "path"

    threshold: float = 0.2
    measure: Measure = "efficiency"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(0 < self.threshold <= 1, "threshold", f"threshold must be over 0 and at most 1, not {self.threshold}")

    @property
    @override
    def decides(self) -> Literal["steps"]:
        return "steps"

    @override
    def storage(self, coords: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        return [TensorSpec(coords, wide(dtype)), TensorSpec((2,), wide(dtype))]


_KNOWN: dict[str, type[AdaptiveSchedule]] = {cls.name: cls for cls in (EnergySchedule, OverlapSchedule, PathSchedule)}


def schedule_names() -> list[str]:
    """The names of all rules."""
    return sorted(_KNOWN)


def find_schedule(name: str) -> type[AdaptiveSchedule]:
    """Find a rule by name.

    Args:
        name: Its name in config strings.

    Returns:
        The class.

    Raises:
        SpecError: There is none of that name.
    """
    if name not in _KNOWN:
        near = did_you_mean(name, schedule_names())
        raise SpecError(f"unknown schedule '{name}'{near} Known: {', '.join(schedule_names())}.")
    return _KNOWN[name]
