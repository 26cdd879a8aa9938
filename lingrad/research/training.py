"""One run of a plan: a way to train, on a task, with one seed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import LingradError, SpecError, require
from lingrad.methods import Method, Training
from lingrad.research import processes
from lingrad.research.accounting import gradient_bytes, state_bytes
from lingrad.research.checks import Schedule
from lingrad.research.diagnostics import ObservedRun, make_diagnostic
from lingrad.research.plan import ResearchPlan
from lingrad.research.pruning import Verdict, rung_steps
from lingrad.research.record import finite
from lingrad.research.task import Part, Task, moved
from lingrad.research.trackers import LogValues
from lingrad.tensors import distinct, nbytes

T = TypeVar("T", int, float)
METRICS = "metrics.jsonl"
JUDGED = "judged"  # key of a line: the metric at a rung
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


def train(
    plan: ResearchPlan,
    method: Method,
    *,
    seed: int,
    part: Part,
    out: Path | None,
    log: LogValues = lambda values, step: None,
    verdict: Verdict = lambda rung, value: False,
) -> dict[str, Any]:
    """Train once, and judge.

    Args:
        plan: The plan: its task, steps, schedule, dtype and device.
        method: The way to train.
        seed: Of everything random.
        part: What the model is judged by.
        out: A folder; gets `METRICS`, a line for every step, with what the plan's diagnostics have measured in it. None for a
            process that writes nothing.
        log: Called with the numbers of each line, and with the metrics at the end.
        verdict: Says at the rungs of a plan with a pruner, in the first process, whether to stop.

    Returns:
        ``metrics`` of the task, ``steps``, ``tokens``, ``seconds``, ``step_seconds``, the median, ``refresh_seconds``, numbers
        of parameters, ``stopped``, the rung at which it was, or 0, and ``bytes`` of ``state``, of ``gradients`` between
        backward and step, the most and the median of all steps, and of ``saved`` activations.

    Raises:
        DivergedError: A loss was not finite.
        SpecError: The task gives no batch, or not its metric; or two diagnostics measure something of one name.
    """
    task, dtype = plan.task, getattr(torch, plan.dtype)
    steps = plan.steps or steps_for(task, plan.tokens, seed)
    rungs = rung_steps(steps, plan.rungs) if plan.pruner != "none" and part == "tuning" else {}
    torch.manual_seed(seed)
    built = task.build(seed, dtype).to(plan.device)
    training = method.prepare(built)
    model = training.model.train()
    replica = processes.replicated(model)
    factor = partial(rate, steps=steps, warmup=plan.warmup, schedule=plan.schedule)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in training.optimizers]
    run = ObservedRun(task, method, built, training, seed, steps, dtype, plan.device, factor)
    diagnostics = [make_diagnostic(text, plan.folder) for text in plan.diagnostics]
    with run.aside():
        for diagnostic in diagnostics:
            diagnostic.begin(run)
    spent, tokens, done, stopped = 0.0, 0, 0, 0
    plain: list[float] = []
    refreshing: list[float] = []
    metrics: dict[str, float] = {}
    held: list[int] = []  # bytes of gradients in each step
    saved_bytes = 0
    with (Path(os.devnull) if out is None else out / METRICS).open("w") as file:
        for whole in islice(task.batches(steps, seed), steps):
            rows, weight = processes.share(task, whole)
            batch = moved(rows, plan.device)
            run.changes.clear()
            with run.aside():
                for diagnostic in diagnostics:
                    diagnostic.before(batch)
            before, start = _refreshes(training), time.perf_counter()
            training.zero_grad()
            with _counted(model) if done == 0 else _nothing() as saved:
                loss = task.loss(replica, batch)
            loss = loss if weight == 1.0 else weight * loss
            loss.backward()
            held.append(max(gradient_bytes(model, one) for one in training.optimizers))
            training.step()
            used = schedulers[0].get_last_lr()[0]
            for scheduler in schedulers:
                scheduler.step()
            value, took = processes.mean_of_all(loss), time.perf_counter() - start
            saved_bytes = saved[0] if done == 0 else saved_bytes
            done, tokens, spent = done + 1, tokens + task.tokens(whole), spent + took
            refreshed = _refreshes(training) - before
            (refreshing if refreshed else plain).append(took)
            line = dict(zip(OF_EACH_STEP, (done, value, used, took, tokens), strict=True))
            with run.aside():
                for diagnostic in diagnostics if math.isfinite(value) else ():
                    line |= _measured(diagnostic.after(done), line)
                if done in rungs and math.isfinite(value):
                    metrics = _judged(task, model, part, done)
                    line |= _measured({JUDGED: metrics[task.metric]}, line)
            _line(file, line)
            log({key: value for key, value in line.items() if key != "step"}, done)
            if not math.isfinite(value):
                raise DivergedError(f"the loss of step {done} is {value}")
            if done in rungs and processes.agreed(processes.rank() == 0 and verdict(rungs[done], metrics[task.metric])):
                stopped = rungs[done]
                break
    if done < steps and not stopped:
        raise SpecError(f"the task gave {done} batches where {steps} steps were asked for")
    if not stopped:
        metrics = _judged(task, model, part, done)
    log(metrics, done)
    slower = sum(refreshing) - len(refreshing) * _median(plain) if refreshing and plain else 0.0
    return {
        "metrics": metrics,
        "steps": done,
        "stopped": stopped,
        "tokens": tokens,
        "seconds": spent,
        "step_seconds": _median([*plain, *refreshing]),
        "refresh_seconds": max(0.0, slower),
        "bytes": {
            "state": sum(state_bytes(one) for one in training.optimizers),
            "gradients": max(held),
            "gradients_median": _median(held),
            "saved": saved_bytes,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in _trained(training)),
    }


def _judged(task: Task, model: nn.Module, part: Part, done: int) -> dict[str, float]:
    """Judge a model after some steps; it trains on afterwards, or not."""
    model.eval()
    with torch.no_grad():
        metrics = {key: float(value) for key, value in task.judge(model, part).items()}
    model.train()
    if task.metric not in metrics:
        raise SpecError(f"the task's metric is '{task.metric}', and its judge gives {', '.join(metrics) or 'nothing'}")
    if not math.isfinite(metrics[task.metric]):
        raise DivergedError(f"the {task.metric} after {done} steps is {metrics[task.metric]}")
    return metrics


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


def _line(file: IO[str], values: Mapping[str, Any]) -> None:
    file.write(json.dumps(finite(values)) + "\n")


def _median(values: list[T]) -> T:
    return sorted(values)[len(values) // 2]
