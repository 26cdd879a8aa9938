"""Results: JSON, tables in Markdown, plots, and their way into the docs."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import host, plots, traffic
from benchmarks.measure import ratio
from benchmarks.plan import FROZEN, FULL, GALORE, GOALS, OPTIMIZER, PERIOD, Workload
from lingrad.console import markdown as tabulate
from lingrad.files.atomic import write_whole

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "out"
DOCS = ROOT / "docs" / "performance.md"
PACKAGES = ("torch", "transformers", "peft", "galore-torch", "pytorch_optimizer", "apollo-torch")


def machine(device: str) -> dict[str, Any]:
    """Where it was measured, and with which versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    found: dict[str, Any] = {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version()}
    found["when"] = time.strftime("%Y-%m-%d %H:%M:%S")
    return found | {package: installed(package) for package in PACKAGES}


def installed(package: str) -> str:
    """The version of a package, or that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def described(workload: Workload) -> dict[str, Any]:
    """A workload in plain values."""
    return asdict(workload) | {"dtype": str(workload.dtype).removeprefix("torch."), "tokens": workload.tokens}


def save(found: dict[str, Any], folder: Path) -> None:
    """Write ``latest.json`` and a copy under ``runs``, ``table.md`` and the plots, each whole.

    Args:
        found: What was measured.
        folder: Where to; made if it is not there.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    written = json.dumps(found, indent=1).encode()
    name = f"{found['machine']['when']}-{found['plan']}".replace(" ", "-").replace(":", "")
    write_whole(folder / "runs" / f"{name}.json", written)
    write_whole(folder / "latest.json", written)
    write_whole(folder / "table.md", markdown(found).encode())
    plots.draw(found, folder)


def markdown(found: dict[str, Any]) -> str:
    """All tables of a run."""
    about = found["machine"]
    versions = ", ".join(f"{package} {about[package]}" for package in PACKAGES)
    parts = [
        f"Plan `{found['plan']}` on {about['device']}, {about['threads']} threads, {about['when']}, in "
        f"{found['seconds'] / 60:.1f} minutes; {versions}.\n",
    ]
    if found["figures"]:
        parts.append(goals(found["figures"]))
    if found["plan"] == "quick":
        parts.insert(1, "Goals are for the whole plan, whose steps are of llama1024; these are of a smaller model.\n")
    for name, timings in found["steps"].items():
        parts.append(f"**{name}**, one step:\n\n{steps_table(timings)}")
    if found["refreshes"]:
        parts.append(f"**Refreshes** on gradients of a training run:\n\n{refresh_table(found['refreshes'])}")
    if "pca" in found:
        parts.append(f"**Online PCA**, one update of a 2736 x 1024 gradient at rank 128:\n\n{pca_table(found['pca'])}")
    if "memory" in found:
        parts.append(f"**Memory** of a step with checkpointing, in MB:\n\n{memory_table(found['memory'])}")
        parts.append(
            f"**Saved** for the backward by q, k, v, o, gate and up, numbers a token:\n\n{saved_table(found['saved'])}"
        )
    if "overhead" in found:
        parts.append(f"**Overhead** of the engine's step, in ms:\n\n{overhead_table(found['overhead'])}")
    if "host" in found:
        table = host.eager_table(found["host"])
        parts.append(f"**Host time** of a step on tiny tensors, eager, CPU time of one thread:\n\n{table}")
        parts.append(f"**Host time**, compiled:\n\n{host.compiled_table(found['host, compiled'])}")
    if "compiled" in found:
        parts.append(f"**Compiled** steps, CPU time of one thread:\n\n{host.compiled_table(found['compiled'])}")
    if "policies" in found:
        parts.append(f"**Policies**, one step:\n\n{policies_table(found['policies'])}")
    if "traffic" in found:
        parts.append(f"**Sent** by one of two processes in a step, fully_shard, in kB:\n\n{traffic.table(found['traffic'])}")
    for what, points in found["curves"].items():
        parts.append(f"**Over {what}**, ratios to full AdamW:\n\n{curve_table(what, points)}")
    return "\n".join(parts)


def goals(figures: dict[str, float]) -> str:
    """Each goal with what was measured, and what it would be if time went by the count of operations alone."""
    rows = [("figure", "goal", "measured", "by operations", "")]
    for goal in GOALS:
        if goal.figure not in figures:
            continue
        value = figures[goal.figure]
        reached = value >= goal.goal if goal.least else value <= goal.goal
        sign = ">=" if goal.least else "<="
        work = figures.get(f"{goal.figure} operations")
        by_work = "" if work is None else f"{work:.3f}"
        said = "reached" if reached else "not reached"
        rows.append((goal.what, f"{sign} {goal.goal:.2f}", f"{value:.3f}", by_work, said))
    return tabulate(rows)


def _spread(timing: dict[str, Any]) -> list[float]:
    return [taken + timing["extra"] / PERIOD for taken in timing["seconds"]]


def steps_table(timings: list[dict[str, Any]]) -> str:
    """Whole steps, each beside full AdamW, galore_torch and the limit."""
    by_key = {timing["key"]: timing for timing in timings}
    beside = [key for key in (FULL, GALORE, FROZEN) if key in by_key]
    rows = [("method", "ms", *(f"/ {key}" for key in beside), "refresh ms", "GFLOP", "GB moved", "GFLOP/s", "state MB")]
    for timing in timings:
        middle = median(timing["seconds"])
        ratios = [str(ratio(_spread(timing), _spread(by_key[key]))) for key in beside]
        work, moved = timing["flops"] / 1e9, timing["bytes"] / 1e9
        refresh = f"{1e3 * timing['extra']:.0f}" if timing["refreshes"] else ""
        rows.append(
            (
                timing["key"],
                f"{1e3 * middle:.1f}",
                *ratios,
                refresh,
                f"{work:.1f}",
                f"{moved:.2f}",
                f"{work / middle:.0f}",
                f"{timing['state'] / 1e6:.1f}",
            )
        )
    return tabulate(rows)


def policies_table(timings: list[dict[str, Any]]) -> str:
    """Steps with each policy, beside one without and full AdamW's."""
    by_key = {timing["key"]: timing for timing in timings}
    none = by_key[OPTIMIZER]
    rows = [("", "ms", "/ none", f"/ {FULL}", "refresh ms", "GFLOP", "GFLOP beyond none", "state MB")]
    for timing in timings:
        key = "none" if timing is none else timing["key"]
        ratios = [str(ratio(_spread(timing), _spread(other))) for other in (none, by_key[FULL])]
        refresh = f"{1e3 * timing['extra']:.0f}" if timing["refreshes"] else ""
        work = (f"{timing['flops'] / 1e9:.1f}", f"{(timing['flops'] - none['flops']) / 1e9:+.1f}")
        state = f"{timing['state'] / 1e6:.1f}"
        rows.append((key, f"{1e3 * median(timing['seconds']):.1f}", *ratios, refresh, *work, state))
    return tabulate(rows)


def refresh_table(records: list[dict[str, Any]]) -> str:
    """Refreshes of each shape beside the exact SVD's; energies are the least of its layers, after the last capture."""
    shapes: dict[tuple[int, ...], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        group = shapes.setdefault((*record["shape"], record["rank"], record["tokens"]), {})
        group.setdefault(record["transform"], []).append(record)
    rows = [("gradient, rank, tokens", "transform", "ms", "/ exact", "energy / exact's")]
    for (m, n, rank, tokens), group in shapes.items():
        exact = median(t for record in next(iter(group.values())) for t in record["seconds"])
        for text, members in group.items():
            taken = median(t for record in members for t in record["seconds"])
            energy = min(record["energy"] / record["best"] for record in members)
            shown = f"`{text.replace('{rank}', str(rank))}`"
            rows.append((f"{m} x {n}, {rank}, {tokens}", shown, f"{1e3 * taken:.1f}", f"{taken / exact:.3f}", f"{energy:.3f}"))
    return tabulate(rows)


def pca_table(seconds: dict[str, list[float]]) -> str:
    """Updates of online PCA."""
    rows = [("update", "ms", "/ autograd")]
    for key, taken in seconds.items():
        beside = "autograd, from factors" if "factors" in key else "autograd"
        rows.append((key, f"{1e3 * median(taken):.2f}", str(ratio(taken, seconds[beside]))))
    return tabulate(rows)


def memory_table(found: dict[str, dict[str, Any]]) -> str:
    """What is alive at the peak of an ordinary step, and beyond weights and activations at that of one that refreshes."""
    names = ("gradient", "coords", "coords gradient", "basis", "moments")
    rows = [("method", *names, "temporaries", "beyond weights and activations", "/ galore_torch", "in a refresh")]
    beside = found[GALORE]["beyond"]
    for key, entry in found.items():
        at = entry["ordinary"]
        other = entry["beyond"] - sum(at.get(name, 0) for name in names)
        cells = [f"{at.get(name, 0) / 1e6:.1f}" for name in names]
        total, refresh = entry["beyond"], entry["at refresh"]
        rows.append((key, *cells, f"{other / 1e6:.1f}", f"{total / 1e6:.1f}", f"{total / beside:.2f}", f"{refresh / 1e6:.1f}"))
    return tabulate(rows)


def saved_table(found: dict[str, float]) -> str:
    """Numbers saved a token."""
    rows = [("", "numbers a token", "/ plain")]
    rows += [(key, f"{found[key]:.0f}", f"{found[key] / found['plain']:.3f}") for key in ("plain", "ours", "ours, shared")]
    return tabulate(rows)


def overhead_table(found: dict[str, float]) -> str:
    """What a step of the engine takes beside the base's."""
    rows = [("opt.step()", "of it the base", "a whole step of full AdamW", "(step - base) / full")]
    rows.append((*(f"{1e3 * found[key]:.2f}" for key in ("step", "base", "full")), f"{found['share']:.3f}"))
    return tabulate(rows)


def curve_table(what: str, points: list[dict[str, Any]]) -> str:
    """Ratios to full AdamW along one axis."""
    keys = [timing["key"] for timing in points[0]["steps"] if timing["key"] != FULL]
    rows = [(what, *keys)]
    for point in points:
        by_key = {timing["key"]: timing for timing in point["steps"]}
        at = plots.place(what, point["workload"])
        rows.append((str(at), *(str(ratio(_spread(by_key[key]), _spread(by_key[FULL]))) for key in keys)))
    return tabulate(rows)
