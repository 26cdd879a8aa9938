"""One run of a plan: a way to train, on a task, with one seed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import LingradError, SpecError, require
from lingrad.methods import Method, Training
from lingrad.research.diagnostics import ObservedRun, make_diagnostic
from lingrad.research.plan import ResearchPlan, Schedule
from lingrad.research.record import finite
from lingrad.research.runner import gradient_bytes, state_bytes
from lingrad.research.task import Part, Task
from lingrad.tensors import distinct, nbytes

METRICS = "metrics.jsonl"
OF_EACH_STEP = ("step", "loss", "lr", "seconds", "tokens")  # keys of a line, besides those of diagnostics


class DivergedError(LingradError):
    """A loss was not finite; no more was trained."""


def rate(step: int, steps: int, warmup: float, schedule: Schedule) -> float:
    """A factor on the learning rate.

    Args:
        step: Steps done.
        steps: All of them.
        warmup: Share of the steps in which it rises.
        schedule: What follows: it stays, or falls to nothing along a line, or to a tenth along a cosine.

    Returns:
        The factor, between 0 and 1.
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def steps_for(task: Task, tokens: int, seed: int) -> int:
    """How many batches have a number of tokens, the last of them in full.

    Args:
        task: The task.
        tokens: The budget.
        seed: Of the order of the batches.

    Returns:
        Their number, two or more.

    Raises:
        SpecError: One batch has as many, batches have none, or there are too few.
    """
    asked = 1
    while True:
        seen = found = 0
        for found, batch in enumerate(islice(task.batches(asked, seed), asked), start=1):
            seen += task.tokens(batch)
            if seen >= tokens:
                short = f"a budget of {tokens} tokens is one batch, of {seen}; expected two batches or more"
                require(found > 1, "tokens", short)
                return found
        if seen == 0 or found < asked:
            why = f"the task gave {found} batches with {seen} tokens, where a budget of {tokens} tokens was asked for"
            raise SpecError(why, option="tokens")
        asked = max(asked + 1, math.ceil(1.1 * asked * tokens / seen))


def train(plan: ResearchPlan, method: Method, *, seed: int, part: Part, out: Path) -> dict[str, Any]:
    """Train once, and judge.

    Args:
        plan: The plan: its task, steps, schedule, dtype and device.
        method: The way to train.
        seed: Of everything random.
        part: What the model is judged by.
        out: A folder; gets `METRICS`, a line for every step, with what the plan's diagnostics have measured in it.

    Returns:
        ``metrics`` of the task, ``steps``, ``tokens``, ``seconds``, bytes of ``state``,
        ``gradients`` and ``saved`` activations, ``refresh_seconds``, and numbers of parameters.

    Raises:
        DivergedError: A loss was not finite.
        SpecError: The task gives no batch, or not its metric; or two diagnostics measure something of one name.
    """
    task, dtype = plan.task, getattr(torch, plan.dtype)
    steps = plan.steps or steps_for(task, plan.tokens, seed)
    torch.manual_seed(seed)
    built = task.build(seed, dtype).to(plan.device)
    training = method.prepare(built)
    model = training.model.train()
    factor = partial(rate, steps=steps, warmup=plan.warmup, schedule=plan.schedule)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in training.optimizers]
    run = ObservedRun(task, method, built, training, seed, steps, dtype, plan.device, factor)
    diagnostics = [make_diagnostic(text, plan.folder) for text in plan.diagnostics]
    with run.aside():
        for diagnostic in diagnostics:
            diagnostic.begin(run)
    spent, tokens, done = 0.0, 0, 0
    plain: list[float] = []
    refreshing: list[float] = []
    found = {"gradients": 0, "saved": 0}
    with (out / METRICS).open("w") as file:
        for batch in islice(task.batches(steps, seed), steps):
            batch = _to(batch, plan.device)
            run.changes.clear()
            with run.aside():
                for diagnostic in diagnostics:
                    diagnostic.before(batch)
            before, start = _refreshes(training), time.perf_counter()
            training.zero_grad()
            with _counted(model) if done == 0 else _nothing() as saved:
                loss = task.loss(model, batch)
            loss.backward()
            found["gradients"] = max(found["gradients"], *(gradient_bytes(model, one) for one in training.optimizers))
            training.step()
            used = schedulers[0].get_last_lr()[0]
            for scheduler in schedulers:
                scheduler.step()
            value, took = float(loss.detach()), time.perf_counter() - start
            found["saved"] = saved[0] if done == 0 else found["saved"]
            done, tokens, spent = done + 1, tokens + task.tokens(batch), spent + took
            refreshed = _refreshes(training) - before
            (refreshing if refreshed else plain).append(took)
            line = dict(zip(OF_EACH_STEP, (done, value, used, took, tokens), strict=True))
            with run.aside():
                for diagnostic in diagnostics if math.isfinite(value) else ():
                    line |= _measured(diagnostic.after(done), line)
            _line(file, line)
            if not math.isfinite(value):
                raise DivergedError(f"the loss of step {done} is {value}")
    if done < steps:
        raise SpecError(f"the task gave {done} batches where {steps} steps were asked for")
    model.eval()
    with torch.no_grad():
        metrics = {key: float(value) for key, value in task.judge(model, part).items()}
    if task.metric not in metrics:
        raise SpecError(f"the task's metric is '{task.metric}', and its judge gives {', '.join(metrics) or 'nothing'}")
    if not math.isfinite(metrics[task.metric]):
        raise DivergedError(f"the {task.metric} after {done} steps is {metrics[task.metric]}")
    slower = sum(refreshing) - len(refreshing) * _median(plain) if refreshing and plain else 0.0
    return {
        "metrics": metrics,
        "steps": done,
        "tokens": tokens,
        "seconds": spent,
        "refresh_seconds": max(0.0, slower),
        "bytes": {"state": sum(state_bytes(one) for one in training.optimizers), **found},
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in _trained(training)),
    }


def _trained(training: Training) -> list[Tensor]:
    return list({id(p): p for one in training.optimizers for group in one.param_groups for p in group["params"]}.values())


def _refreshes(training: Training) -> int:
    ours = [one for one in training.optimizers if isinstance(one, SubspaceOptimizer)]
    return sum(sum(one.refreshes().values()) for one in ours)


def _measured(values: Mapping[str, float], line: Mapping[str, Any]) -> dict[str, float]:
    """What a diagnostic has measured, as plain numbers under names that nothing else has."""
    for name in values:
        if name in line:
            raise SpecError(f"a diagnostic measures '{name}', which the run or another one measures too; give it another name")
    return {name: float(value) for name, value in values.items()}


@contextmanager
def _counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Count the bytes that a forward saves for its backward, of what is no parameter."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    counted = [0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
    counted[0] = nbytes(*distinct(kept.values()))


@contextmanager
def _nothing() -> Iterator[list[int]]:
    yield [0]


def _to(batch: Any, device: str) -> Any:
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _line(file: IO[str], values: Mapping[str, Any]) -> None:
    file.write(json.dumps(finite(values)) + "\n")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
