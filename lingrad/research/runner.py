"""Run the entries of an experiment on the same batches, one step each in turn, so that their timings are comparable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad import api, optimizers
from lingrad.config.targets import resolve_model
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.models import build_llama, next_token_loss
from lingrad.research.corpus import Corpus, check_length, training_batches, validation_batches
from lingrad.research.plans import Entry, Setup
from lingrad.tensors import distinct, nbytes
from lingrad.testing.training import weight_gap


@dataclass
class Record:
    """What was measured of one entry.

    Args:
        label: The entry's label.
        rules: Its config string or rules, or None.
        options: The options of its optimizer: learning rate, scale and so on.
        train: Training loss of every step, nats per token.
        valid: (step, validation loss), from before the first step to after the last.
        seconds: Time of forward, backward and step, for every step.
        gradient_bytes: Bytes of all gradients between backward and step, for every step. At a refresh they include what the
            refresh needs of the full gradient.
        state_bytes: Bytes of moments and bases after the last step.
        gaps: (step, largest difference of any weight, the same relative to the weight's norm) from the reference entry.
        refreshes: Refreshes of the first weight.
    """

    label: str
    rules: str | None
    options: dict[str, Any] = field(default_factory=dict)
    train: list[float] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient_bytes: list[int] = field(default_factory=list)
    state_bytes: int = 0
    gaps: list[tuple[int, float, float]] = field(default_factory=list)
    refreshes: int = 0


class EntryRun:
    """One entry in training.

    Args:
        entry: The entry.
        setup: The sizes.
        dtype: The dtype of weights and coordinates.
    """

    def __init__(self, entry: Entry, setup: Setup, dtype: torch.dtype) -> None:
        self.entry = entry
        self.record = Record(entry.label, entry.rules, entry.options)
        self.model = build_llama(setup.model, seed=setup.seed, dtype=dtype)
        if entry.rules is None:
            self.optimizer: Optimizer = full_rank_optimizer(self.model, entry)
        else:
            make = api.adapt if entry.mode == "adapter" else api.wrap
            self.optimizer = make(self.model, entry.rules, entry.base, seed=setup.seed, **entry.options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: learning_rate(step, setup))
        self.switches = {round(fraction * setup.steps) for fraction in entry.switches}

    def step(self, number: int, batch: Tensor) -> None:
        """Train on one batch and record its loss, time and gradient bytes."""
        if self.entry.reverse:
            batch = batch.flip(0)
        if number in self.switches and isinstance(self.optimizer, SubspaceOptimizer):
            self.optimizer.switch("adapter" if self.optimizer.mode == "optimizer" else "optimizer")
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = next_token_loss(self.model, batch)
        loss.backward()
        backward_ended = time.perf_counter()
        self.record.gradient_bytes.append(gradient_bytes(self.model, self.optimizer))
        step_started = time.perf_counter()
        self.optimizer.step()
        self.scheduler.step()
        self.record.seconds.append(backward_ended - started + time.perf_counter() - step_started)
        self.record.train.append(loss.item())

    @torch.no_grad()
    def validate(self, number: int, batches: list[Tensor]) -> None:
        """Record the mean validation loss after ``number`` steps."""
        self.model.eval()
        losses = [next_token_loss(self.model, batch).item() for batch in batches]
        self.model.train()
        self.record.valid.append((number, sum(losses) / len(losses)))

    def weights(self) -> dict[str, Tensor]:
        """The effective weights: those that the forward uses."""
        if isinstance(self.optimizer, SubspaceOptimizer):
            return self.optimizer.weights()
        return dict(self.model.named_parameters())


def full_rank_optimizer(model: nn.Module, entry: Entry) -> Optimizer:
    """The optimizer of full-rank training, without lingrad.

    Args:
        model: The model.
        entry: The base and its options; ``scale`` multiplies the learning rate of linear layers.

    Returns:
        The optimizer.
    """
    options = dict(entry.options)
    scale = options.pop("scale", 1.0)
    plan = resolve_model(model, "full()")
    groups = [{"params": [target.param for target in plan.targets]}, {"params": [param for _, param in plan.full]}]
    optimizer = optimizers.find(entry.base, options).build(groups)
    optimizer.param_groups[0]["lr"] *= scale
    return optimizer


def compare(
    entries: list[Entry],
    setup: Setup,
    corpus: Corpus,
    *,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, list[Record]], None] = lambda step, records: None,
) -> list[Record]:
    """Train every entry on the same batches, one step each in turn.

    Args:
        entries: The entries to compare.
        setup: The sizes.
        corpus: The text.
        dtype: The dtype of the weights.
        on_step: Called after each step of all entries, with the step and the records so far.

    Returns:
        One record per entry.
    """
    check_length(corpus, setup.model.length)
    size = {"rows": setup.rows, "length": setup.model.length}
    runs = {entry.label: EntryRun(entry, setup, dtype) for entry in entries}
    records = [run.record for run in runs.values()]
    held_out = validation_batches(corpus, batches=setup.eval_batches, **size)
    for run in runs.values():
        run.validate(0, held_out)
    for number, batch in enumerate(training_batches(corpus, steps=setup.steps, seed=setup.seed, **size)):
        for run in runs.values():
            run.step(number, batch)
        done = number + 1
        for run in runs.values():
            if run.entry.reference is not None:
                run.record.gaps.append((done, *weight_gap(run.weights(), runs[run.entry.reference].weights())))
            if done % setup.eval_every == 0 or done == setup.steps:
                run.validate(done, held_out)
        on_step(done, records)
    for run in runs.values():
        run.record.state_bytes = state_bytes(run.optimizer)
        if isinstance(run.optimizer, SubspaceOptimizer):
            run.record.refreshes = run.optimizer.subspaces[0].basis.refreshes
    return records


def learning_rate(step: int, setup: Setup) -> float:
    """The schedule of GaLore's recipe: a linear rise, then a cosine down to a tenth.

    Args:
        step: Steps done.
        setup: The number of steps and the warm-up.

    Returns:
        A factor on the learning rate.
    """
    rise = max(1, round(setup.warmup * setup.steps))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, setup.steps - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))


def gradient_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of all gradients: of parameters, of coordinates, and what a refresh keeps until the step."""
    params = {id(p): p for p in model.parameters()}
    params |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    total = nbytes(*(p.grad for p in params.values() if p.grad is not None))
    if isinstance(optimizer, SubspaceOptimizer):
        total += sum(sub.pending.nbytes for sub in optimizer.subspaces)
    return total


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer stores between steps: moments, step counters and bases."""
    if isinstance(optimizer, SubspaceOptimizer):  # whose ``state`` may have the weights too
        return nbytes(*distinct(tensor for tensor, kind in optimizer.held() if kind in ("moments", "basis")))
    stored: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    return nbytes(*distinct(t for t in stored if isinstance(t, Tensor)))
