"""How far a run is from one that should give the same weights: that one is trained beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import LingradError
from lingrad.methods import Lingrad, Training
from lingrad.research.diagnostics.base import Diagnostic, ObservedRun
from lingrad.research.task import mapped, tensors_of

TIMES = 20  # in a run, at most
SWITCHES = (0.4, 0.7)  # parts of a run after which its mode is switched


class RunBeside(Diagnostic):
    """|A - B| / |B| between the weights of the run, A, and those of another run that is trained beside it, B.

    The largest of any weight, in Frobenius norms, as in docs/duality.md; `TIMES` times in a run at most, and at its end. The
    other run has the same seed and random state, and takes as long as the run itself, and as much memory. A method of another
    package has no gap.

    Attributes:
        name: What the gap is called.
    """

    name: ClassVar[str]

    def method(self, method: Lingrad) -> Lingrad:
        """The other run's method, of this one's; the same unless a subclass says otherwise."""
        return method

    def before_step(self, number: int) -> None:
        """Change the other run before its step, the first of which is 0; nothing unless a subclass says otherwise."""

    def batch(self, batch: Any) -> Any:
        """What the other run trains on where this one trains on a batch; the same unless a subclass says otherwise."""
        return batch

    @override
    def begin(self, run: ObservedRun) -> None:
        super().begin(run)
        self._at = run.marks(TIMES)
        self._other: Training | None = None
        self._batch: Any = None
        if not isinstance(run.method, Lingrad):
            return
        torch.manual_seed(run.seed)
        try:
            self._other = self.method(run.method).prepare(run.task.build(run.seed, run.dtype).to(run.device))
        except LingradError:  # it has no dual
            return
        self._other.model.train()
        self._schedulers = [torch.optim.lr_scheduler.LambdaLR(one, run.factor) for one in self._other.optimizers]

    @override
    def before(self, batch: Any) -> None:
        if self._other is not None:  # the random state is the one that the run's own forward begins with
            self._batch, self._random = self.batch(deepcopy(batch)), _random_state(self.run.device)

    @override
    def after(self, step: int) -> Mapping[str, float]:
        if self._other is None:
            return {}
        torch.set_rng_state(self._random[0])
        for state in self._random[1:]:
            torch.cuda.set_rng_state(state, self.run.device)
        self.before_step(step - 1)
        self._other.zero_grad()
        self.run.task.loss(self._other.model, self._batch).backward()
        self._other.step()
        for scheduler in self._schedulers:
            scheduler.step()
        if step not in self._at:
            return {}
        return {self.name: largest_gap_of(_weights(self.run.training), _weights(self._other))}


class ModeGap(RunBeside):
    """The gap to the same run in the other mode; a method without a dual has none."""

    name = "gap"

    @override
    def method(self, method: Lingrad) -> Lingrad:
        return replace(method, mode="adapter" if method.mode == "optimizer" else "optimizer")


class SwitchedGap(RunBeside):
    """The gap to the same run with its mode switched twice, after `SWITCHES` of its steps.

    A method without a dual has none, nor has a run of two steps.
    """

    name = "gap_switched"

    @override
    def begin(self, run: ObservedRun) -> None:
        super().begin(run)
        self._switches = {round(part * run.steps) for part in SWITCHES}
        if len(self._switches) < len(SWITCHES):  # there are too few steps
            self._other = None
        try:
            for _ in range(2 if self._other is not None else 0):  # there and back, which changes nothing
                self._switch()
        except LingradError:  # it has no dual
            self._other = None

    @override
    def before_step(self, number: int) -> None:
        if number in self._switches:
            self._switch()

    def _switch(self) -> None:
        for one in () if self._other is None else self._other.optimizers:
            if isinstance(one, SubspaceOptimizer):
                one.switch("adapter" if one.mode == "optimizer" else "optimizer")


class RowOrderGap(RunBeside):
    """The gap to the same run with the rows of each batch in reverse order.

    That is the same mathematics with other rounding: the control that another gap is compared with. Of a batch, a tensor or a
    mapping or list of tensors, those are reversed that have as many rows as the first with two dimensions or more; a batch
    without one has no control.
    """

    name = "gap_control"

    @override
    def batch(self, batch: Any) -> Any:
        rows = next((len(one) for one in tensors_of(batch) if one.dim() > 1), 0)
        if not rows:
            self._other = None
        return mapped(batch, lambda tensor: tensor.flip(0) if tensor.dim() and len(tensor) == rows else tensor)


@torch.no_grad()
def largest_gap_of(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest |A - B|_F / |B|_F of any weight, in float64; 0 for two that are both zero, NaN where some element is.

    Args:
        a: Weights by name.
        b: Weights by the same names.

    Returns:
        The gap.
    """
    gaps = [0.0]
    for name, weight in b.items():
        apart = float((a[name].double() - weight.double()).norm())
        gaps.append(apart / max(float(weight.double().norm()), torch.finfo(torch.float64).tiny) if apart else 0.0)
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)


def _weights(training: Training) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for one in training.optimizers:
        found |= one.weights() if isinstance(one, SubspaceOptimizer) else {}
    return found


def _random_state(device: str) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if torch.device(device).type == "cuda" else []
    return [torch.get_rng_state(), *on_device]
