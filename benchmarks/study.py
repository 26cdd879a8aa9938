"""A study: entries whose learning rate is tuned by one rule, and the best run with several seeds; each run a line of a file.

The rate is tried at three powers of two and then on beyond the best of them until it is not at the edge, with one seed. Kill it
at any moment and start it again: what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

import lingrad
from lingrad.console import markdown
from lingrad.errors import LingradError
from tools.marks import put

EXAMPLES = Path(__file__).parents[1] / "examples"
TUNE, SEEDS, MOST = 0, (1, 2, 3), 8  # the seed of tuning, those of the results, trials at most

E = TypeVar("E", bound=NamedTuple)
S = TypeVar("S", bound="Study[Any]")


class Study(ABC, Generic[E]):
    """The runs of a study, in a file with a line for each.

    Args:
        path: The file; several processes that run different entries may share it.
        kind: The class of the entries, a NamedTuple of plain values with ``start``, the first power of two that is tried.
    """

    def __init__(self, path: Path, kind: type[E]) -> None:
        self.path, self.kind = path, kind
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for line in lines:
            run = json.loads(line)
            self.found[self.key(kind(**run["entry"]), run["factor"], run["seed"])] = run

    @abstractmethod
    def train(self, entry: E, factor: float, seed: int) -> dict[str, Any]:
        """Train once.

        Args:
            entry: How.
            factor: What multiplies the learning rate that is tuned.
            seed: Of everything random.

        Returns:
            ``loss``, which is to be small, and other plain values.
        """

    @staticmethod
    def key(entry: E, factor: float, seed: int) -> tuple[Any, ...]:
        """What a run is."""
        return (*entry, factor, seed)

    def get(self, entry: E, factor: float, seed: int) -> float:
        """The loss of a run, which is made if there is none; infinite where it diverged."""
        key = self.key(entry, factor, seed)
        if key not in self.found:
            start = time.perf_counter()
            try:
                found = self.train(entry, factor, seed)
            except LingradError as error:  # what is not finite is not merged
                found = {"loss": float("nan"), "error": str(error)}
            seconds = round(time.perf_counter() - start, 1)
            values: Any = entry._asdict()
            run = {"entry": values, "factor": factor, "seed": seed, **found, "seconds": seconds}
            sys.stdout.write(f"{self.label(entry)}, x{factor}, seed {seed}: {found['loss']:.4f}, {seconds} s\n")
            sys.stdout.flush()
            with self.path.open("a") as file:
                file.write(json.dumps(run) + "\n")
            self.found[key] = run
        loss: float = self.found[key]["loss"]
        return loss if math.isfinite(loss) else float("inf")

    def label(self, entry: E) -> str:
        """An entry in a line of progress."""
        named: Any = entry
        return str(named.name)

    def tune(self, entry: E) -> float:
        """The best factor, by the rule of the module."""
        first: int = getattr(entry, "start")  # noqa: B009 - of the NamedTuple that the study has
        tried = {power: self.get(entry, 2.0**power, TUNE) for power in range(first - 1, first + 2)}
        while len(tried) < MOST:
            best = min(tried, key=lambda power: tried[power])
            if min(tried) < best < max(tried):
                break
            beyond = best - 1 if best == min(tried) else best + 1
            tried[beyond] = self.get(entry, 2.0**beyond, TUNE)
        return 2.0 ** min(tried, key=lambda power: tried[power])

    def run(self, entry: E) -> None:
        """Tune an entry, and run the best with each seed."""
        factor = self.tune(entry)
        for seed in SEEDS:
            self.get(entry, factor, seed)

    def results(self, entry: E) -> tuple[dict[int, dict[str, Any]], list[float]] | None:
        """The runs of an entry with each seed, and the factors that were tried; None where some were not made."""
        runs = [run for run in self.found.values() if self.kind(**run["entry"]) == entry]
        found = {run["seed"]: run for run in runs if run["seed"] in SEEDS}
        tried = [run["factor"] for run in runs if run["seed"] == TUNE and math.isfinite(run["loss"])]
        return (found, tried) if len(found) == len(SEEDS) else None


def command(
    about: str | None, study: Callable[[Path], S], entries: Iterable[Any], shown: Callable[[S], str], mark: str
) -> None:
    """The command line of a study: run what is missing, and print the table or put it into a page.

    Args:
        about: What ``--help`` says.
        study: Opens the study in a file, by default ``docs/studies/<mark>.jsonl``.
        entries: Its entries.
        shown: Its table.
        mark: The name of the page's marks for it.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"docs/studies/{mark}.jsonl"))
    words = "entries that have one of these words in their names; without any, only the table"
    parser.add_argument("--only", nargs="*", default=[""], help=words)
    parser.add_argument("--into", type=Path, help="a page with marks for the table")
    asked = parser.parse_args()
    opened = study(asked.out)
    torch.set_num_threads(1)
    for entry in entries:
        if any(word in entry.name for word in asked.only):
            opened.run(entry)
    text = shown(opened) + "\n"
    if asked.into is None:
        sys.stdout.write(text)
    else:
        put(asked.into, {mark: text})


def table(
    study: Study[E],
    entries: Iterable[E],
    beside: str,
    headers: tuple[str, str],
    *,
    lr: float,
    digits: int,
    value: Callable[[float], float] = lambda loss: loss,
) -> str:
    """The entries of a study that have all their runs, as Markdown.

    Args:
        study: The runs.
        entries: Its entries.
        beside: The ``spec`` of the entry that the others are compared with, seed by seed.
        headers: Of the value, and of the difference.
        lr: The learning rate of factor 1.
        digits: After the point.
        value: What is shown of a loss.

    Returns:
        A row for each: mean and standard error over the seeds, the mean difference and its standard error, the learning rate
        (with a star at the edge of those tried), and MB beyond the model.
    """
    made = {entry: study.results(entry) for entry in entries}
    found = {entry: results for entry, results in made.items() if results is not None}
    values = {entry: [value(results[seed]["loss"]) for seed in SEEDS] for entry, (results, _) in found.items()}
    first = next((entry for entry in found if getattr(entry, "spec") == beside), None)  # noqa: B009 - of the study's own class
    rows = [("method", headers[0], headers[1], "learning rate", "MB")]
    for entry, (results, tried) in found.items():
        apart = [a - b for a, b in zip(values[entry], values[first], strict=True)] if first not in (None, entry) else []
        less = f"{statistics.mean(apart):+.{digits}f} ± {error(apart):.{digits}f}" if apart else ""
        factor = results[SEEDS[0]]["factor"]
        star = "*" if factor in (min(tried), max(tried)) else ""
        shown = f"{statistics.mean(values[entry]):.{digits}f} ± {error(values[entry]):.{digits}f}"
        rows.append((study.label(entry), shown, less, f"{lr * factor:.2g}{star}", f"{results[SEEDS[0]]['bytes'] / 1e6:.1f}"))
    return markdown(rows)


def example_program(name: str) -> Any:
    """An example as a module, for its own functions that read data and make models."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - the file is of this repository
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linear(step: int, steps: int) -> float:
    """A factor of the learning rate: a tenth of the steps up, then a line down to nothing."""
    rise = steps // 10
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise)


def error(values: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def taken(model: nn.Module, optimizer: torch.optim.Optimizer, *, whole: bool) -> int:
    """Bytes of training beyond the model itself: added weights, bases, the optimizer's state, gradients.

    Args:
        model: The model.
        optimizer: Its optimizer.
        whole: Whether each step reads the gradients of transformed weights themselves.

    Returns:
        The sum.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    if not isinstance(optimizer, lingrad.SubspaceOptimizer):
        state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
        added = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" in name)
        return gradients + state + added
    held = sum(
        t.untyped_storage().nbytes() for t, kind in optimizer.held() if kind in ("moments", "basis", "coords") and t.dim()
    )
    dense = sum(math.prod(sub.weight.layout.shape) * 4 for sub in optimizer.subspaces) if whole else 0
    return gradients + held + dense
