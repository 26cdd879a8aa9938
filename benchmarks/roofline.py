"""Predicted GPU time of a step, operator by operator: ``python -m benchmarks.roofline`` (ten minutes; no GPU is used).

The operators are those of a real step on meta tensors (`benchmarks.launches`). An operator takes the larger of its operations
over the card's rate and its bytes over the card's bandwidth (`benchmarks.cards`). The host's time is measured by the same
command, on tiny tensors on this CPU. Nothing is fitted. Three regimes: *eager*; *graph*, the same kernels in a CUDA graph;
*compiled*, a CUDA graph in which forward and backward have been compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import host, measure, report
from benchmarks.cards import CARDS, LAUNCH, Phases, eager, graph
from benchmarks.launches import record
from benchmarks.plan import (
    ADAPTER,
    EIGHT_BIT,
    ENTRIES,
    FROZEN,
    FULL,
    GALORE,
    LLAMA_1024,
    LORA,
    LORA_ONE,
    PERIOD,
    RANDOM,
    SIZES,
    TINY,
    Workload,
)
from lingrad.console import markdown as tabulate
from lingrad.files.atomic import write_whole

REGIMES = ("eager", "graph", "compiled")
KEYS = (FULL, FROZEN, RANDOM, EIGHT_BIT, ADAPTER, LORA_ONE, GALORE)
DEPTHS = (2, 4)  # layers that are recorded; deeper models are extrapolated
HOST_DEPTHS = (2, 8)

SMALL = replace(LLAMA_1024, name="llama1024")
WORKLOADS = (
    SMALL,
    replace(SMALL, rows=64, dtype=torch.bfloat16),
    *(
        Workload(name, SIZES[name], rows, rank, torch.bfloat16)
        for name, ranks in (("1B", (128, 512)), ("7B", (128, 512, 1024)))
        for rank in ranks
        for rows in (1, 4)
    ),
)
# ms on an H100 (docs/performance.md), of methods whose code is as it was then: (dtype, tokens) -> key -> ms
MEASURED = {
    ("float32", 2048): {FULL: 20.1, FROZEN: 15.1, LORA_ONE: 21.0},
    ("bfloat16", 16384): {FULL: 27.6, FROZEN: 24.9, LORA_ONE: 31.0, LORA: 32.0},
}


def extrapolated(recorded: Mapping[int, Phases], layers: int, evaluate: Callable[[Phases, int], float]) -> float:
    """A figure of a model of many layers, from those of models of few.

    Args:
        recorded: Layers -> phases; one entry, of this very number, or two.
        layers: The number of layers.
        evaluate: Gives the figure of some phases of a model of some layers.

    Returns:
        The figure.
    """
    if layers in recorded:
        return evaluate(recorded[layers], layers)
    (few, a), (many, b) = recorded.items()
    low, high = evaluate(a, few), evaluate(b, many)
    return high + (high - low) / (many - few) * (layers - many)


def predict(workload: Workload, key: str, lines: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Predict the step of one method.

    Args:
        workload: The model and the batch.
        key: Of the method.
        lines: Phase -> host seconds of a model without layers, and of a layer (`host.per_layer`).

    Returns:
        Card -> regime -> ms; ``host``, ms of the host, launches included; ``launches``; ``TFLOP``.
    """
    shape, method = workload.model, ENTRIES[key].make(workload.rank, PERIOD)
    depths = (shape.layers,) if shape.layers <= max(DEPTHS) else DEPTHS
    recorded = {n: record(method, replace(shape, layers=n), workload.dtype, workload.tokens) for n in depths}

    def whole(evaluate: Callable[[Phases, int], float]) -> float:
        return extrapolated(recorded, shape.layers, evaluate)

    def host_time(layers: int) -> dict[str, float]:
        return {phase: max(0.0, fixed + each * layers) for phase, (fixed, each) in lines.items()}

    def total(field: str) -> float:
        return whole(lambda phases, _: float(sum(getattr(row, field) for rows in phases.values() for row in rows)))

    found: dict[str, Any] = {}
    for name, card in CARDS.items():
        found[name] = {
            "eager": 1e3 * whole(lambda phases, n, card=card: eager(phases, card, host_time(n))),
            "graph": 1e3 * whole(lambda phases, _, card=card: graph(phases, card)),
            "compiled": 1e3 * whole(lambda phases, _, card=card: graph(phases, card, compiled=True)),
        }
    launches = total("launches")
    busy = 1e3 * (sum(host_time(shape.layers).values()) + LAUNCH * launches)
    return found | {"host": busy, "launches": round(launches), "TFLOP": total("flops") / 1e12}


def run(workloads: Sequence[Workload], keys: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure the host's time, and predict.

    Args:
        workloads: The models and batches.
        keys: Of the methods; full AdamW first.
        rounds: How many steps of each are timed.

    Returns:
        Plain values: ``host``, ``rows``, ``check``, ``machine``.
    """
    measured = {(str(w.dtype), key) for w in workloads for key in keys} | {(str(w.dtype), LORA) for w in workloads[:2]}
    lines = {}
    for dtype in sorted({w.dtype for w in workloads}, key=str):
        own = [key for key in (*keys, LORA) if (str(dtype), key) in measured]
        measure.say(f"host time of {len(own)} methods in {dtype}")
        lines[str(dtype)] = host.per_layer(own, rounds, dtype, TINY, HOST_DEPTHS)
    rows, check = [], []
    for workload in workloads:
        measure.say(f"{workload.name}, rank {workload.rank}, {workload.tokens} tokens, {workload.dtype}")
        of_host = lines[str(workload.dtype)]
        methods = {key: predict(workload, key, of_host[key]) for key in keys}
        described = report.described(workload)
        rows.append({"workload": described, "methods": methods})
        known = MEASURED.get((described["dtype"], workload.tokens), {}) if workload.name == SMALL.name else {}
        for key, ms in known.items():
            made = methods[key] if key in methods else predict(workload, key, of_host[key])
            check.append({"workload": described, "key": key, "predicted": made["H100"]["eager"], "measured": ms})
    return {"host": lines, "rows": rows, "check": check, "machine": report.machine("cpu")}


def markdown(found: dict[str, Any]) -> str:
    """The tables: a prediction for each card, what the host takes, and the check against an H100."""
    about = found["machine"]
    parts = [f"Predicted, host time measured on {about['device']}, torch {about['torch']}, {about['when']}.\n"]
    for card in CARDS:
        parts.append(
            f"**{card}**: full AdamW in ms, the others as ratios to it in the same regime; *{', '.join(REGIMES)}*:\n\n"
            f"{card_table(found['rows'], card)}"
        )
    parts.append(f"The host, launches included, and the launches of a step:\n\n{host_table(found['rows'])}")
    if found["check"]:
        parts.append(f"Eager steps of llama1024 that have been measured on an H100, in ms:\n\n{check_table(found['check'])}")
    return "\n".join(parts)


def _place(workload: dict[str, Any]) -> str:
    dtype = "float32, " if workload["dtype"] == "float32" else ""
    return f"{workload['name']}, {dtype}r = {workload['rank']}, {workload['tokens']:,} tokens"


def card_table(rows: Sequence[dict[str, Any]], card: str) -> str:
    """Full AdamW in ms, and ratios to it in each regime."""
    keys = list(rows[0]["methods"])
    lines = [("model, rank, tokens", "full, ms", *keys[1:], "on a GPU")]
    for row in rows:
        full = row["methods"][keys[0]][card]
        cells = [", ".join(f"{full[regime]:.1f}" for regime in REGIMES)]
        for key in keys[1:]:
            own = row["methods"][key][card]
            cells.append(", ".join(f"{own[regime] / full[regime]:.2f}" for regime in REGIMES))
        lines.append((_place(row["workload"]), *cells, "not measured"))
    return tabulate(lines)


def host_table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of the host, and launches."""
    keys = list(rows[0]["methods"])
    lines = [("model, rank, tokens: ms of the host (launches)", *keys)]
    for row in rows:
        entries = [row["methods"][key] for key in keys]
        lines.append((_place(row["workload"]), *(f"{e['host']:.1f} ({e['launches']})" for e in entries)))
    return tabulate(lines)


def check_table(check: Sequence[dict[str, Any]]) -> str:
    """Predicted and measured, of methods whose code is as it was when they were measured."""
    lines = [("", "method", "predicted", "measured", "predicted / measured")]
    for entry in check:
        ratio = entry["predicted"] / entry["measured"]
        cells = (f"{entry['predicted']:.1f}", f"{entry['measured']:.1f}", f"{ratio:.2f}")
        lines.append((_place(entry["workload"]), entry["key"], *cells))
    return tabulate(lines)


def main() -> None:
    """Predict, write the results, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="steps on tiny tensors that are timed")
    parser.add_argument("--out", type=Path, default=report.OUT / "predicted")
    chosen = parser.parse_args()
    found = run(WORKLOADS, KEYS, chosen.rounds)
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_whole(chosen.out / "latest.json", json.dumps(found, indent=1).encode())
    write_whole(chosen.out / "table.md", markdown(found).encode())
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
