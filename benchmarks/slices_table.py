"""The tables of the study of slices: ``python -m benchmarks.slices_table [--into docs/decentralized.md]``."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.slices import RESULTS, Entry, Results, ablations, entries
from benchmarks.study import SEEDS, TUNE
from lingrad.console import markdown as tabulate
from tools.marks import put


class Row(NamedTuple):
    """An entry's results.

    Args:
        mean: Of the losses of all seeds.
        error: Its standard error.
        factor: The best one.
        at_edge: Whether it is the smallest or the largest that was tried.
        sent: Megabytes that a worker sent of the linear weights.
    """

    mean: float
    error: float
    factor: float
    at_edge: bool
    sent: float

    @property
    def loss(self) -> str:
        """The mean and its standard error, in thousandths."""
        return f"{self.mean:.3f} ± {1000 * self.error:.0f}{'*' if self.at_edge else ''}"


def row(results: Results, entry: Entry) -> Row | None:
    """The results of an entry; None where not all of its runs are there."""
    runs = [run for run in results.found.values() if Entry(**run["entry"]) == entry]
    tried = {run["factor"]: run["loss"] for run in runs if run["seed"] == TUNE and math.isfinite(run["loss"])}
    found = [run for run in runs if run["seed"] in SEEDS]
    if len(found) < len(SEEDS):
        return None
    losses, factor = [run["loss"] for run in found], found[0]["factor"]
    error = statistics.stdev(losses) / len(losses) ** 0.5
    at_edge = factor in (min(tried), max(tried))
    return Row(statistics.mean(losses), error, factor, at_edge, found[0]["sent"] / 1e6)


def table(results: Results) -> str:
    """The tables of docs/decentralized.md.

    Args:
        results: The runs.

    Returns:
        Markdown.
    """
    found = {entry: one for entry in entries() if (one := row(results, entry)) is not None}
    parallel = [(e.name, one.loss, f"{one.factor:g}", f"{one.sent:.2f}") for e, one in found.items() if e.every is None]
    parts = [tabulate([("gradients averaged at every step", "loss", "factor", "MB sent"), *parallel])]
    ablated = set(ablations(50))
    for workers in (4, 2, 8):
        of = {entry: one for entry, one in found.items() if entry.workers == workers and entry.every and entry not in ablated}
        if not of:
            continue
        rounds = sorted({entry.every for entry in of if entry.every})
        rows = []
        for name in dict.fromkeys(entry.name for entry in of):
            cells = []
            for every in rounds:
                one = next((one for entry, one in of.items() if (entry.name, entry.every) == (name, every)), None)
                cells += [one.loss if one else "", f"{one.sent:.2f}" if one else ""]
            rows.append((name, *cells))
        head = (f"{workers} workers", *(text for every in rounds for text in (f"H = {every}: loss", "MB sent")))
        parts.append(tabulate([head, *rows]))
    rows = [(e.name, one.loss, f"{one.factor:g}", f"{one.sent:.2f}") for e, one in found.items() if e in ablated]
    parts.append(tabulate([("4 workers, H = 50", "loss", "factor", "MB sent"), *rows]))
    parts.append(differences(results, [entry for entry in found if entry.every and entry not in ablated]))
    return "\n\n".join(parts)


def differences(results: Results, compared: list[Entry]) -> str:
    """Losses less that of the mean of identical slices of the same rank, workers and rounds, seed by seed.

    Args:
        results: The runs.
        compared: The entries.

    Returns:
        Markdown: means and standard errors, in thousandths.
    """
    by_seed = {
        entry: {run["seed"]: run["loss"] for run in results.found.values() if Entry(**run["entry"]) == entry}
        for entry in compared
    }
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for entry, losses in by_seed.items():
        rank = ", r 1" if entry.name.endswith(", r 1") else ""
        base = next((e for e in by_seed if (e.name, *e[3:5]) == (f"slices, identical, mean{rank}", *entry[3:5])), None)
        if base is None or base == entry:
            continue
        apart = [losses[seed] - by_seed[base][seed] for seed in SEEDS]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        cells.setdefault(entry.name, {})[entry[3:5]] = f"{1000 * statistics.mean(apart):+.0f} ± {1000 * error:.0f}"
    columns = sorted({column for of in cells.values() for column in of})
    head = ("less the mean of identical slices, in thousandths", *(f"N {workers}, H {every}" for workers, every in columns))
    return tabulate([head, *((name, *(of.get(column, "") for column in columns)) for name, of in cells.items())])


def main() -> None:
    """Print the tables, or put them between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path)
    asked = parser.parse_args()
    text = table(Results(asked.out)) + "\n"
    if asked.into is None:
        sys.stdout.write(text)
    else:
        put(asked.into, {"slices": text})


if __name__ == "__main__":
    main()
