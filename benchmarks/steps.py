"""Whole training steps of many methods, in turn, on the same real text."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import flops, measure
from benchmarks.corpus import tokenize, training_batches
from benchmarks.plan import ENTRIES, PERIOD, Steps, Workload
from lingrad.methods import Training
from lingrad.models import build_llama, next_token_loss
from lingrad.research.corpus import moby_dick
from lingrad.tensors import distinct

WARM_UP = 2
PHASES = ("zero_grad", "forward", "backward", "step")


def batches(workload: Workload, steps: int, device: str) -> Iterator[Tensor]:
    """Windows of Moby-Dick, byte by byte."""
    text = tokenize("Moby-Dick", moby_dick())
    for batch in training_batches(text, steps=steps, rows=workload.rows, length=workload.model.length, seed=0):
        yield batch.to(device)


def build(workload: Workload, device: str, *, checkpointing: bool = False) -> nn.Module:
    """The model of a workload, made on its device.

    Its ``use_cache`` stays on: without it transformers reads positions back in each forward, and compiled attention has a mask.

    Args:
        workload: The workload.
        device: Where.
        checkpointing: Recompute each layer in the backward.

    Returns:
        The model.
    """
    with torch.device(device):
        model = build_llama(workload.model, seed=0, dtype=workload.dtype)
    if checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def run_step(training: Training, batch: Tensor, lap: Callable[[str], None] | None = None, model: Any = None) -> Tensor:
    """Run one step of any method.

    Args:
        training: The model and its optimizers.
        batch: Token ids, int64 [rows, length].
        lap: Called with the name of each phase in `PHASES` when it is over.
        model: What computes the logits, if not the model itself, such as the compiled model.

    Returns:
        The loss.
    """
    lap = lap or (lambda phase: None)
    training.zero_grad()
    lap("zero_grad")
    loss = next_token_loss(training.model if model is None else model, batch)
    lap("forward")
    loss.backward()
    lap("backward")
    training.step()
    lap("step")
    return loss.detach()


class MethodRun:
    """One method under way.

    Args:
        key: Of the method.
        workload: The model and the batch.
        every: Steps between refreshes.
        device: Where.
        backend: Of ``torch.compile``; empty where the model is not compiled. Graph breaks are allowed.
        checkpointing: Recompute each layer in the backward.
    """

    def __init__(
        self, key: str, workload: Workload, every: int, device: str, *, backend: str = "", checkpointing: bool = False
    ) -> None:
        model = build(workload, device, checkpointing=checkpointing)
        self.method = ENTRIES[key].make(workload.rank, every)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # galore_torch's AdamW announces its own deprecation
            self.training: Training = self.method.prepare(model)
        self.model: Any = torch.compile(self.training.model, backend=backend) if backend else self.training.model

    def step(self, batch: Tensor, lap: Callable[[str], None] | None = None) -> Tensor:
        """Forward, backward, step; see `run_step`."""
        return run_step(self.training, batch, lap, self.model)

    def state_bytes(self) -> int:
        """Bytes that the optimizers keep between steps: moments, bases, coordinates that are held."""
        found: list[Tensor] = []
        for optimizer in self.training.optimizers:
            entries = [item for state in optimizer.state.values() for item in state.items()]
            held: list[Any] = [value for key, value in entries if ".stored." not in str(key)]  # not the weights of a checkpoint
            held += [getattr(value, "ortho_matrix", None) for value in held]  # projectors of others
            held += getattr(optimizer, "tensors", list)()  # of one that keeps them elsewhere
            held += [tensor for sub in getattr(optimizer, "subspaces", ()) for tensor in (*sub.basis.tensors(), sub.coords)]
            found += [value for value in held if isinstance(value, Tensor)]
        return sum(tensor.untyped_storage().nbytes() for tensor in distinct(found))


@dataclass
class Timing:
    """What was measured of one method.

    Args:
        key: The method's short name.
        label: Its long one.
        seconds: Steps that refresh nothing.
        refresh: Steps that do; of a method without refreshes, steps like any.
        flops: Of a step that refreshes nothing.
        bytes: That its operators read and write.
        state: Bytes kept between steps.
        refreshes: Whether the method has refreshes.
    """

    key: str
    label: str
    seconds: list[float]
    refresh: list[float]
    flops: int
    bytes: int
    state: int
    refreshes: bool

    @property
    def extra(self) -> float:
        """Seconds that a refresh adds to a step."""
        return max(0.0, median(self.refresh) - median(self.seconds)) if self.refreshes else 0.0

    @property
    def spread(self) -> list[float]:
        """Seconds a step, the refresh spread over `PERIOD` steps."""
        return [taken + self.extra / PERIOD for taken in self.seconds]


def compare(plan: Steps, device: str) -> dict[str, Timing]:
    """Time the steps of some methods in turn.

    Args:
        plan: The methods and the workload.
        device: Where.

    Returns:
        Key -> what was measured.
    """
    workload, every = plan.workload, plan.ordinary + 1
    measure.say(f"{workload.name}: {workload.tokens} tokens, rank {workload.rank}, {len(plan.keys)} methods")
    runs = {key: MethodRun(key, workload, every, device) for key in plan.keys}
    total = plan.blocks * every  # of the first block the refresh and one step warm everything up
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    refresh: dict[str, list[float]] = {key: [] for key in runs}
    given = list(batches(workload, total + 1, device))
    for key, run in runs.items():
        for batch in given[: every - 1] if ENTRIES[key].from_one else ():
            run.step(batch)  # so that it refreshes when the others do
    for number, batch in enumerate(given[:total]):
        for key, run in runs.items():
            taken = measure.timed(lambda run=run, batch=batch: run.step(batch))
            if number >= WARM_UP:
                (refresh if number % every == 0 else seconds)[key].append(taken)
    found = {}
    for key, run in runs.items():
        run.step(given[0])  # this one refreshes; the one that is counted does not
        with measure.Traffic() as moved:
            operations = flops.count(lambda run=run: run.step(given[1]))
        label, state, refreshes = run.method.label, run.state_bytes(), ENTRIES[key].every
        found[key] = Timing(key, label, seconds[key], refresh[key], operations, moved.nbytes, state, refreshes)
    runs.clear()
    gc.collect()
    return found


def plain(found: dict[str, Timing]) -> list[dict[str, Any]]:
    """The timings as plain values."""
    return [asdict(timing) | {"extra": timing.extra} for timing in found.values()]


def overhead(workload: Workload, rounds: int, device: str) -> dict[str, float]:
    """What the engine's own step takes beside the base's.

    Args:
        workload: The model and the batch.
        rounds: How many steps are timed.
        device: Where.

    Returns:
        Medians in seconds: ``step``, ``base``, ``full`` (a whole step of full AdamW), and ``share``, the median over rounds of
        (step - base) / full.
    """
    measure.say(f"{workload.name}: overhead of the engine's step")
    full, ours = (MethodRun(key, workload, 10**6, device) for key in ("full", "optimizer"))
    (optimizer,) = ours.training.optimizers
    spent = {"base": 0.0, "step": 0.0}

    def watch(owner: Any, name: str) -> None:
        inner: Callable[[], Any] = owner.step

        def outer(*args: Any) -> Any:
            started = measure.synchronized()
            value = inner(*args)
            spent[name] += measure.synchronized() - started
            return value

        vars(owner)["step"] = outer

    times: dict[str, list[float]] = {"base": [], "step": [], "full": []}
    for number, batch in enumerate(batches(workload, rounds + 3, device)):
        if number == 2:  # the first two steps make bases and moments
            watch(optimizer.base, "base")
            watch(optimizer, "step")
        taken = measure.timed(lambda batch=batch: full.step(batch))
        spent.update(base=0.0, step=0.0)
        ours.step(batch)
        if number > 2:
            times["full"].append(taken)
            for name in spent:
                times[name].append(spent[name])
    share = median((s - b) / f for s, b, f in zip(times["step"], times["base"], times["full"], strict=True))
    return {name: median(values) for name, values in times.items()} | {"share": share}
