"""A learning rate range test of a run, which is then as if it had not taken place (Smith 2017, arXiv 1506.01186, section 3.3).

The learning rate rises from step to step until the loss does. Smith raises it linearly and reads the useful range off a plot;
here it rises geometrically, the loss is smoothed, and a tenth of the rate at which it is lowest is suggested, as by Gugger
("How do you find a good learning rate", 2018) and fastai's rule ``minimum``.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lingrad import console, plotting
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import ModeError, SpecError, require, shown
from lingrad.tensors import is_sharded

BELOW = 10.0  # the suggestion is the rate of the lowest smoothed loss divided by this
Step = Callable[[], Any]


@dataclass(frozen=True)
class RateTest:
    """What a range test has found.

    Args:
        rates: The learning rate of each step: of the coordinates, before ``scale``.
        losses: The loss of each, before the step was taken; those that are not finite are left out.
        smoothed: Their exponential average, corrected for its start.
        ended: ``high``: all steps were taken; ``diverged``: the smoothed loss rose above the bound; ``not finite``.
        ended_at: The last learning rate that was tried.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    ended: Literal["high", "diverged", "not finite"]
    ended_at: float

    @property
    def lowest(self) -> float | None:
        """The rate at which the smoothed loss was lowest; None if no loss was finite."""
        return self.rates[self.smoothed.index(min(self.smoothed))] if self.smoothed else None

    @property
    def suggestion(self) -> float | None:
        """A tenth of `lowest`; None where the loss never fell, or was still falling at the highest rate."""
        lowest = self.lowest
        never = lowest is None or lowest == self.rates[0]
        falling = self.ended == "high" and lowest == self.rates[-1]
        return None if lowest is None or never or falling else lowest / BELOW

    @property
    def why(self) -> str:
        """How the test ended and what follows from it, in a sentence each."""
        ends = {
            "high": f"All steps were taken, up to {self.ended_at:.3g}.",
            "diverged": f"The smoothed loss rose above the bound at {self.ended_at:.3g}.",
            "not finite": f"The loss was not finite at {self.ended_at:.3g}.",
        }
        if self.suggestion is not None:
            found = f"Suggested: {self.suggestion:.3g}, a tenth of {self.lowest:.3g}, where the smoothed loss was lowest."
        elif self.ended == "high" and self.lowest == self.rates[-1]:
            found = "No suggestion: the loss was still falling; try a larger `high`."
        else:
            found = "No suggestion: the loss never fell; try a smaller `low`, or look for a fault in the step."
            if not self.losses:
                found = "No suggestion: the first loss was not finite; look for a fault in the step, or in the model as it is."
        return f"{ends[self.ended]} {found}"

    def table(self, lines: int = 20) -> list[tuple[str, ...]]:
        """Header and rows of a table: rate, loss, smoothed loss.

        Args:
            lines: The most rows; of more steps some are left out, never the first and the last.

        Returns:
            Text cells.
        """
        last = len(self.rates) - 1
        shown_steps = sorted({round(i * last / max(1, lines - 1)) for i in range(lines)}) if last >= 0 else []
        cells = [(f"{self.rates[i]:.3g}", f"{self.losses[i]:.4g}", f"{self.smoothed[i]:.4g}") for i in shown_steps]
        return [("rate", "loss", "smoothed"), *cells]

    def to_json(self) -> str:
        """All of it as JSON, with ``lowest``, ``suggestion`` and ``why``."""
        return json.dumps({**asdict(self), "lowest": self.lowest, "suggestion": self.suggestion, "why": self.why}, indent=1)

    def plot(self, path: str | Path) -> Path:
        """Draw loss and smoothed loss over the rate, and the suggestion.

        Args:
            path: The file; its suffix decides the format. Written atomically.

        Returns:
            The path. Raises `DependencyError` if matplotlib is not installed.
        """
        figure, (axes,) = plotting.figure((8.0, 4.5))
        axes.set(title="Learning rate range test", xlabel="learning rate", ylabel="loss", xscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.plot(self.rates, self.losses, color="C0", alpha=0.35, linewidth=1.2, label="loss")
        axes.plot(self.rates, self.smoothed, color="C0", linewidth=1.8, label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="C1", linestyle="--", label=f"suggested: {self.suggestion:.3g}")
        if self.rates:
            axes.legend()
            # where the loss diverges nothing else would be seen
            least, most = min(self.losses), max(self.losses[: 1 + self.smoothed.index(min(self.smoothed))])
            if most > least:
                axes.set_ylim(least - 0.05 * (most - least), most + 0.3 * (most - least))
        return plotting.save(figure, Path(path))

    def __str__(self) -> str:
        return "\n".join([*console.columns(self.table(), [True] * 3, rule=True), "", self.why])


def find_lr(
    opt: SubspaceOptimizer,
    step: Step,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    bound: float = 4.0,
    on_step: Callable[[int, float], None] = lambda done, loss: None,
) -> RateTest:
    """Try learning rates from low to high, one step each, and put the run back as it was, to the bit.

    Model, coordinates, bases, moments, counters, learning rates and torch's random state are saved in host memory and restored,
    also where ``step`` raises; gradients are dropped. What else ``step`` changes is the caller's: the position in the data, a
    GradScaler, the random state of Python and NumPy.

    Args:
        opt: The run, of `lingrad.wrap` or `lingrad.adapt`. Param groups keep the ratios of their rates.
        step: Takes one training step and returns its loss, a number or a tensor of one element: zero_grad, forward, backward,
            ``opt.step()`` on the next batch. A scheduler must not be stepped in it. With several processes all call this, and
            losses are averaged.
        low: The first learning rate, of the coordinates, before ``scale``.
        high: The last.
        steps: How many, geometrically spaced.
        smoothing: The weight of the past in the average of losses, 0 to below 1.
        bound: The test ends where the smoothed loss exceeds the lowest so far by more than (bound - 1) times its size.
        on_step: Called after each step with the number of steps and the loss.

    Returns:
        Rates, losses and a suggestion.

    Raises:
        SpecError: An option is wrong; ``step`` returns no loss, changes the learning rate, or never calls ``opt.step()``.
        ModeError: The run was detached, trains in rounds with others, or has no learning rate.
    """
    _check(opt, step, low=low, high=high, steps=steps, smoothing=smoothing, bound=bound)
    ratios = _ratios(opt)
    found = RateTest([], [], [], "high", high)
    ended: Literal["high", "diverged", "not finite"] = "high"
    rate, average, best, stepped = low, 0.0, math.inf, False
    with _restored(opt):
        for done in range(1, steps + 1):
            rate = low * (high / low) ** ((done - 1) / (steps - 1))
            now = [_set(group, rate * ratio) for group, ratio in zip(opt.param_groups, ratios, strict=True)]
            before = opt._run.step
            loss = _mean(opt, _number(step()))
            stepped = stepped or opt._run.step != before
            if [float(group["lr"]) for group in opt.param_groups] != now:
                raise SpecError("step() changed the learning rate, which the test sets; leave the scheduler out of it")
            on_step(done, loss)
            if not math.isfinite(loss):
                ended = "not finite"
                break
            average = smoothing * average + (1 - smoothing) * loss
            smoothed = average / (1 - smoothing**done)
            found.rates.append(rate)
            found.losses.append(loss)
            found.smoothed.append(smoothed)
            best = min(best, smoothed)
            if smoothed - best > (bound - 1) * abs(best):
                ended = "diverged"
                break
    if not stepped:
        raise SpecError("step() never called opt.step(): it is to train on one batch, with the optimizer that was given")
    return RateTest(found.rates, found.losses, found.smoothed, ended, rate)


def _check(opt: Any, step: Any, *, low: Any, high: Any, steps: Any, smoothing: Any, bound: Any) -> None:
    known = isinstance(opt, SubspaceOptimizer)
    require(known, "opt", f"expected the optimizer of lingrad.wrap or lingrad.adapt, not a {type(opt).__name__}")
    require(callable(step), "step", f"step must be a function that trains on one batch and returns the loss, not {shown(step)}")
    number = {name: type(value) in (int, float) and math.isfinite(value) for name, value in (("low", low), ("high", high))}
    require(number["low"] and low > 0, "low", f"low must be a learning rate above 0, not {shown(low)}")
    require(number["high"] and high > low, "high", f"high must be a learning rate above low = {low}, not {shown(high)}")
    require(type(steps) is int and steps >= 2, "steps", f"steps must be a whole number from 2, not {shown(steps)}")
    fits = isinstance(smoothing, int | float) and 0 <= smoothing < 1
    require(fits, "smoothing", f"smoothing must be from 0 to below 1, not {shown(smoothing)}")
    require(isinstance(bound, int | float) and bound > 1, "bound", f"bound must be above 1, not {shown(bound)}")
    if opt.settings.rounds is not None:
        raise ModeError(
            "this run trains in rounds with other workers, to whom steps at trial rates would be sent; test the learning rate "
            "of a run without rounds"
        )


def _ratios(opt: SubspaceOptimizer) -> list[float]:
    """By how much each group's learning rate exceeds that of the coordinates."""
    groups = opt.param_groups
    # while a schedule warms up, rates may all be zero
    plain: list[Any] = [group.get("initial_lr", group.get("lr")) for group in groups]
    first = next((i for i, group in enumerate(groups) if group["kind"] == "coords"), 0)
    if any(lr is None for lr in plain) or not float(plain[first]) > 0:
        raise ModeError(
            f"the learning rate of group '{groups[first]['name']}' is {plain[first]}, and the rates of the others are kept in "
            "proportion to it; make the run with a learning rate above 0, such as lr=1e-3"
        )
    return [float(lr) / float(plain[first]) for lr in plain]


def _set(group: dict[str, Any], rate: float) -> float:
    """Give a group a learning rate; the number that it then has."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
    return float(group["lr"])


def _number(loss: Any) -> float:
    single = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
    if isinstance(loss, bool) or (not single and not isinstance(loss, int | float)):
        raise SpecError(f"step() must return the loss, a number or a tensor of one element, not {shown(loss)}")
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _mean(opt: SubspaceOptimizer, loss: float) -> float:
    """The mean over the processes of the run, so that all of them end the test at one step."""
    run = opt._run
    if run.processes.count == 1:
        return loss
    device = next(run.named()).param.device
    return float(run.processes.average(torch.tensor(loss, dtype=torch.float64, device=device)))


@contextmanager
def _restored(opt: SubspaceOptimizer) -> Iterator[None]:
    """Put a run and torch's random state back at the end, as they are at the beginning."""
    state, model = _copied(opt.state_dict()), opt.model
    modules: dict[str, Any] = {} if model is None else _copied(model.state_dict())
    others = [(tensor, _copied(tensor)) for tensor in _unsaved(opt, modules)]
    # in optimizer mode coordinates are zero without memory between steps, unless another program has written to them
    coords = [(sub, None if sub.released else _copied(sub.coords)) for sub in opt.subspaces]
    rates = [(group["lr"], _copied(group["lr"])) for group in opt.param_groups]
    devices = {named.param.device for named in opt._run.named() if named.param.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            yield
        finally:
            opt.zero_grad()
            for sub, _ in coords if opt.mode == "optimizer" else ():
                if not sub.released:  # a step was interrupted between base and merge
                    sub.restart()
            if model is not None:
                model.load_state_dict(modules)
            with torch.no_grad():
                for tensor, saved in others:
                    tensor.copy_(saved)
                for sub, written in coords if opt.mode == "optimizer" else ():
                    if written is not None:
                        sub.coords.copy_(written)
            opt.load_state_dict(state)
            for group, (lr, value) in zip(opt.param_groups, rates, strict=True):
                group["lr"] = lr.copy_(value) if isinstance(lr, Tensor) else lr


def _unsaved(opt: SubspaceOptimizer, saved: dict[str, Any]) -> list[Tensor]:
    """What no state_dict has: buffers that are not persistent; without a model, its parameters."""
    if opt.model is not None:
        return [buffer for name, buffer in opt.model.named_buffers() if name not in saved]
    full = [named.param for named in opt._run.named() if named.attachment is None]
    return [*full, *(sub.weight.param for sub in opt.subspaces)]


def _copied(value: Any) -> Any:
    """A state in host memory; of a tensor that is cut over processes, where it is."""
    if isinstance(value, Tensor):
        return value.detach().clone() if is_sharded(value) else value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        made = copy.copy(value)  # a model's state has the versions of its modules as an attribute
        made.update({key: _copied(item) for key, item in value.items()})
        return made
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)
