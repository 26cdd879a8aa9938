"""What is measured: workloads, methods, goals. Data only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from benchmarks.peers import Frozen, LinearsOnly, PublishedOSD, apollo_torch, paged_8bit, pytorch_optimizer
from lingrad.methods import FullRank, GaloreTorch, Lingrad, Lora, Method
from lingrad.models import LLAMAS, LlamaShape

PERIOD = 200  # steps over which the cost of a refresh is spread


@dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Args:
        name: What reports call it.
        model: The Llama's shape.
        rows: Windows in a batch; a window has ``model.length`` tokens.
        rank: The rank of all methods.
        dtype: Of the weights.
    """

    name: str
    model: LlamaShape
    rows: int
    rank: int = 128
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.rows * self.model.length


LLAMA_1024 = Workload("llama1024", LlamaShape(256, 1024, 2736, 4, 16, 256), 8)
LLAMA_512 = Workload("llama512", LlamaShape(256, 512, 1376, 4, 8, 256), 8)
TINY = Workload("tiny", LlamaShape(32, 16, 48, 4, 2, 8), 1, rank=2)  # a step takes the host's time only
SIZES = {  # of models that only a GPU trains, in windows of 2,048 tokens
    "llama1024": LLAMA_1024.model,
    "1B": replace(LLAMAS["llama-1b"], length=2048),
    "7B": replace(LLAMAS["llama-7b"], length=2048),
}

FULL, FROZEN, OPTIMIZER, SHARED, EXACT = "full", "frozen", "optimizer", "optimizer, shared", "optimizer, exact svd"
ADAPTER, LORA_ONE, LORA, GALORE = "adapter", "lora, one side", "lora", "galore_torch"
ALL_TRAINED, RANDOM, POWER, PAGED = "adapter, all trained", "optimizer, random", "optimizer, power", "full, paged 8-bit"
EIGHT_BIT = "optimizer, 8-bit moments"


@dataclass(frozen=True)
class Entry:
    """A method in a comparison.

    Args:
        key: Its short name, by which goals refer to it.
        make: Builds the method for a rank and a number of steps between refreshes.
        every: Whether it refreshes at all; False where ``every`` means nothing to it.
        from_one: Whether it counts its steps from one, and so refreshes a step before the others.
    """

    key: str
    make: Callable[[int, int], Method]
    every: bool = True
    from_one: bool = False


def ours(text: str, mode: Literal["optimizer", "adapter"] = "optimizer", **options: Any) -> Callable[[int, int], Method]:
    """A method of lingrad.

    Args:
        text: A config string with ``{rank}`` and ``{every}``.
        mode: The mode.
        **options: Options of `lingrad.wrap`.

    Returns:
        What builds it.
    """
    return lambda rank, every: Lingrad(text.format(rank=rank, every=every), "adamw", mode, {"lr": 1e-4, **options})


RANDOMIZED = "svd(rank={rank}, every={every}, solver=randomized)"

ENTRIES = {
    entry.key: entry
    for entry in (
        Entry(FULL, lambda rank, every: FullRank("adamw"), every=False),
        Entry(PAGED, lambda rank, every: paged_8bit(), every=False),
        Entry(FROZEN, lambda rank, every: Frozen(), every=False),
        Entry(OPTIMIZER, ours(RANDOMIZED)),
        Entry(SHARED, ours(RANDOMIZED, share="input")),
        Entry(EXACT, ours("svd(rank={rank}, every={every})")),
        Entry(POWER, ours("power(rank={rank}, every={every})")),
        Entry(RANDOM, ours("random(rank={rank}, every={every})")),
        Entry(EIGHT_BIT, ours("random(rank={rank}, every={every})", moments="8bit")),
        *(Entry(f"carry, {carry}", ours(RANDOMIZED, carry=carry)) for carry in ("rotate", "transport")),
        *(Entry(f"residual, {rule}", ours(RANDOMIZED, residual=rule)) for rule in ("scaled", "sign", "feedback")),
        Entry("optimizer, online pca", ours("pca(rank={rank})"), every=False),
        Entry(ALL_TRAINED, ours(RANDOMIZED, "adapter")),
        Entry(ADAPTER, lambda rank, every: LinearsOnly(ours(RANDOMIZED, "adapter")(rank, every), rank)),
        Entry(
            "adapter, shared", lambda rank, every: LinearsOnly(ours(RANDOMIZED, "adapter", share="input")(rank, every), rank)
        ),
        Entry(LORA_ONE, lambda rank, every: Lora(rank, one_sided=True), every=False),
        Entry(LORA, lambda rank, every: Lora(rank), every=False),
        Entry(GALORE, GaloreTorch),
        Entry("pytorch_optimizer", pytorch_optimizer, from_one=True),
        Entry("apollo_torch", apollo_torch),
        Entry("osd, autograd", lambda rank, every: PublishedOSD(rank), every=False),
    )
}

MAIN = (FULL, FROZEN, OPTIMIZER, SHARED, EXACT, ADAPTER, LORA_ONE, LORA, GALORE)
OTHERS = (POWER, RANDOM, "optimizer, online pca", ALL_TRAINED, "osd, autograd")
COUNTED = (FULL, FROZEN, RANDOM, POWER, SHARED, ALL_TRAINED, ADAPTER, LORA_ONE, LORA, GALORE)  # launches, host time
COMPILED = (FULL, FROZEN, OPTIMIZER, SHARED, ADAPTER, LORA_ONE)
POLICIES = (FULL, OPTIMIZER, *(key for key in ENTRIES if key.partition(", ")[0] in ("carry", "residual")))
CURVES = (FULL, OPTIMIZER, ADAPTER, LORA_ONE, GALORE)


@dataclass(frozen=True)
class Steps:
    """A comparison of whole steps.

    Args:
        workload: The model and the batch.
        keys: Of the methods.
        blocks: How often a step that refreshes is followed by some that do not, two steps of warm-up included.
        ordinary: How many do not, in each block.
    """

    workload: Workload
    keys: tuple[str, ...]
    blocks: int = 2
    ordinary: int = 4


@dataclass(frozen=True)
class Capture:
    """Gradients of a real training run.

    Args:
        model: The model.
        rows: Windows in a batch.
        steps: The steps whose gradients are kept, counted from 0; the last one ends the run.
        layers: (name of the layer, rank).
        exact_runs: How often the exact SVD is timed; the others at most thrice as often.
    """

    model: LlamaShape
    rows: int
    steps: tuple[int, ...]
    layers: tuple[tuple[str, int], ...]
    exact_runs: int = 3


def captured(
    hidden: int, intermediate: int, heads: int, rows: int, steps: tuple[int, ...], rank: int, runs: int = 3
) -> Capture:
    """A Llama of two layers, three of whose gradients are kept: square, tall and wide."""
    shape = LlamaShape(256, hidden, intermediate, 2, heads, 256)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    return Capture(shape, rows, steps, tuple((name, rank) for name in names), runs)


@dataclass(frozen=True)
class Plan:
    """All of a run.

    Args:
        name: ``quick`` or ``full``.
        steps: Comparisons of whole steps.
        refreshes: Gradients on which refreshes are compared.
        curves: (what changes, comparisons).
        memory: The workload whose memory is told, if any.
        overhead: The workload whose overhead is told.
        rounds: How often short pieces of work are timed.
        host: The workload, a tiny one, whose host time is measured.
        compiled: The workload that is timed under ``torch.compile``, if any.
        policies: The comparison of what carries moments and residuals, if any.
    """

    name: str
    steps: tuple[Steps, ...]
    refreshes: tuple[Capture, ...]
    curves: tuple[tuple[str, tuple[Steps, ...]], ...]
    memory: Workload | None
    overhead: Workload
    rounds: int = 7
    host: Workload = TINY
    compiled: Workload | None = None
    policies: Steps | None = None


def curves(base: Workload, keys: tuple[str, ...] = CURVES) -> tuple[tuple[str, tuple[Steps, ...]], ...]:
    """Over rank, tokens, layers and width, one at a time."""

    def shaped(**changes: Any) -> Workload:
        return replace(base, model=replace(base.model, **changes))

    widths = ((256, 688), (512, 1376), (1024, 2736))
    found = {
        "rank": [replace(base, rank=rank) for rank in (16, 64, 256)],
        "tokens": [replace(base, rows=rows) for rows in (1, 4, 8)],
        "layers": [shaped(layers=layers) for layers in (1, 4)],
        "hidden": [shaped(hidden=hidden, intermediate=inner, heads=hidden // 64) for hidden, inner in widths],
    }
    return tuple((what, tuple(Steps(w, keys) for w in loads)) for what, loads in found.items())


BFLOAT16 = (FULL, FROZEN, OPTIMIZER, SHARED, ADAPTER, LORA_ONE, LORA, GALORE)

QUICK = Plan(
    "quick",
    (Steps(LLAMA_512, MAIN),),
    (captured(256, 688, 4, 8, (5, 10, 20), 32), captured(1024, 2736, 16, 4, (5, 10, 20), 128)),
    (),
    LLAMA_512,
    LLAMA_512,
    policies=Steps(LLAMA_512, POLICIES),
)
WHOLE = Plan(
    "full",
    (
        Steps(LLAMA_1024, (*MAIN, POWER, "adapter, shared", "pytorch_optimizer", "apollo_torch"), blocks=3),
        Steps(LLAMA_512, (FULL, FROZEN, OPTIMIZER, SHARED, GALORE, *OTHERS)),
        Steps(replace(LLAMA_1024, name="llama1024-bf16", dtype=torch.bfloat16), BFLOAT16),
    ),
    (
        captured(256, 688, 4, 8, (20, 40, 80, 160), 32),
        captured(1024, 2736, 16, 8, (5, 10, 15, 20), 128),
        captured(2048, 5461, 32, 8, (4, 8, 12), 256),
        captured(4096, 11008, 32, 4, (2, 4, 6), 512, runs=1),
    ),
    curves(replace(LLAMA_512, rows=4)),
    LLAMA_1024,
    LLAMA_512,
    compiled=LLAMA_1024,
    policies=Steps(LLAMA_1024, POLICIES, blocks=3),
)
PLANS = {plan.name: plan for plan in (QUICK, WHOLE)}


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Args:
        figure: The key of the figure.
        what: What it is.
        goal: At most so much; at least, where ``least``.
        least: Whether more is better.
    """

    figure: str
    what: str
    goal: float
    least: bool = False


GOALS = (
    Goal("optimizer/full", "optimizer mode / fused full AdamW, refresh spread over 200 steps", 0.80),
    Goal("shared/full", 'the same with share="input"', 0.80),
    Goal("optimizer/galore_torch", "optimizer mode / galore_torch, refresh spread over 200 steps", 0.72),
    Goal("shared/galore_torch", 'the same with share="input"', 0.72),
    Goal("optimizer/frozen", "optimizer mode / the frozen-linears limit, refresh spread over 200 steps", 1.12),
    Goal("shared/frozen", 'the same with share="input"', 1.12),
    Goal("adapter/lora", "adapter mode / PEFT LoRA with one side frozen", 0.90),
    Goal("adapter, shared/lora", 'the same with share="input"', 0.90),
    Goal("power/exact", "refresh of 2048 x 2048, r = 256: power / exact SVD", 0.03),
    Goal("power energy", "energy that power captures of what exact SVD does, after 3 refreshes", 0.97, least=True),
    Goal("pca/autograd", "online PCA update / the published autograd form, 2736 x 1024, r = 128", 0.10),
    Goal("memory", "tensor bytes beyond weights and activations at the step's peak / galore_torch", 0.60),
    Goal("saved", "what a layer with a right map saves / the plain layer, in units of r/n", 1.0),
    Goal("overhead", "engine overhead (step minus base) / full AdamW step, llama512", 0.05),
)


@dataclass
class Figures:
    """What was measured, by suite.

    Args:
        values: Key -> figure; a goal without one was not measured in this run.
    """

    values: dict[str, float] = field(default_factory=dict)
