"""Results of a run on a GPU, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.plan import FULL
from lingrad.console import markdown as tabulate

Entries = Sequence[dict[str, Any]]


def markdown(found: dict[str, Any]) -> str:
    """All tables of a run, partial ones too."""
    about, parts = found["machine"], found["parts"]
    versions = ", ".join(f"{name} {about[name]}" for name in found["packages"])
    taken = f"in {found['seconds'] / 60:.1f} minutes"
    text = [f"{about['device']}, {about['when']}, {taken}; Python {about['python']}, {versions}.\n"]
    if found["card"]:
        text.append("; ".join(f"{key}: {value}" for key, value in found["card"].items()) + ".\n")
    if found["dry"]:
        text.append("A dry run at tiny sizes: these figures mean nothing.\n")
    makers = {
        "tests": ("Tests", tests_table),
        "merges": ("**Merges** of float32 coordinates into a bfloat16 weight, us", merges_table),
        "profile": ("**Launches**, and the time of the host and of the card's kernels, ms", profile_table),
        "steps": ("**Eager steps**, ms (ratio to full AdamW)", steps_table),
        "compiled": ("**Compiled steps and CUDA graphs**, ms (ratio to full AdamW in the same regime)", steps_table),
        "memory": ("**Peak memory** of two steps, GB: tensors as simulated and as measured by the allocator", memory_table),
        "throughput": ("**Throughput** with activation checkpointing", throughput_table),
    }
    for name, (title, make) in makers.items():
        part = parts.get(name)
        if part is None:
            continue
        if part["entries"]:
            text.append(f"{title}:\n\n{make(part['entries'])}")
        text += [f"Not measured, {name}: {failure['label']}: {failure['error']}\n" for failure in part["failures"]]
        if part["left out"]:
            text.append(f"Left out, no time was left, {name}: {'; '.join(part['left out'])}.\n")
    return "\n".join(text)


def tests_table(entries: Entries) -> str:
    """What pytest said last, and the tests that failed."""
    return tabulate([("", "pytest"), *((e["label"], "; ".join([e["last"], *e["failed"]]).replace("|", "/")) for e in entries)])


def merges_table(entries: Entries) -> str:
    """Medians in microseconds."""
    ways = [key for key in entries[0] if key not in ("label", "m", "n", "r")]
    rows = [("weight, rank", *ways, "first / second")]
    for entry in entries:
        ratio = entry[ways[0]] / entry[ways[1]]
        rows.append((entry["label"], *(f"{1e6 * entry[way]:.1f}" for way in ways), f"{ratio:.2f}"))
    return tabulate(rows)


def profile_table(entries: Entries) -> str:
    """Launches and milliseconds."""
    rows = [("method", "launches", "counted on meta tensors", "host", "kernels", "step")]
    for e in entries:
        rows.append((e["key"], str(e["launches"]), str(e["counted"]), *(f"{1e3 * e[k]:.2f}" for k in ("host", "card", "step"))))
    return tabulate(rows)


def steps_table(entries: Entries) -> str:
    """A row for each model, rank, number of tokens and regime; a column for each method."""
    keys = list(dict.fromkeys(e["key"] for e in entries))
    places = list(dict.fromkeys(_place(e) for e in entries))
    rows = [("model, rank, tokens", *keys)]
    for place in places:
        own = {e["key"]: 1e3 * median(e["seconds"]) for e in entries if _place(e) == place}
        model, _, tokens, regime = place
        same = [1e3 * median(e["seconds"]) for e in entries if e["key"] == FULL and _without_rank(e) == (model, tokens, regime)]
        rows.append((_written(place), *(_cell(own.get(key), same) for key in keys)))
    return tabulate(rows)


def _place(entry: dict[str, Any]) -> tuple[str, int, int, str]:
    return entry["model"], entry["rank"], entry["tokens"], entry["regime"]


def _without_rank(entry: dict[str, Any]) -> tuple[str, int, str]:
    return entry["model"], entry["tokens"], entry["regime"]


def _written(place: tuple[str, int, int, str]) -> str:
    model, rank, tokens, regime = place
    return f"{model}, r = {rank}, {tokens:,} tokens" + ("" if regime == "eager" else f", {regime}")


def _cell(ms: float | None, full: Sequence[float]) -> str:
    if ms is None:
        return ""
    return f"{ms:.1f} ({ms / full[0]:.2f})" if full else f"{ms:.1f}"


def memory_table(entries: Entries) -> str:
    """Peaks in GB."""
    rows = [("method", "simulated, tensors", "simulated, allocator", "measured, tensors", "measured, allocator")]
    for e in entries:
        sides = [e[source][key] for source in ("simulated", "measured") for key in ("peak", "allocated")]
        rows.append((e["label"], *("" if n is None else f"{n / 1e9:.2f}" for n in sides)))
    return tabulate(rows)


def throughput_table(entries: Entries) -> str:
    """Tokens a second, and the peak."""
    rows = [("method", "tokens / s", "peak, GB")]
    for e in entries:
        peak = "" if e["peak"] is None else f"{e['peak'] / 1e9:.2f}"
        rows.append((e["label"], f"{e['tokens'] / median(e['seconds']):,.0f}", peak))
    return tabulate(rows)
