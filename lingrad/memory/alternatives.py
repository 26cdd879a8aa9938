"""What else would fit: the same run with what saves memory, each simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from shlex import quote
from time import monotonic
from typing import Any

from lingrad.config import spec
from lingrad.config.methods import long_rules, method_of
from lingrad.config.rules import parse_rules
from lingrad.console import columns, say
from lingrad.errors import LingradError
from lingrad.memory.commands import Question, simulate
from lingrad.memory.report import MemoryReport
from lingrad.memory.units import readable
from lingrad.methods import Lora, Method

SECONDS = 60.0  # after which no further simulation begins


@dataclass(frozen=True)
class Alternatives:
    """What was simulated in place of a run that does not fit.

    Args:
        reports: What is changed -> the report.
        untried: What there was no time for.
    """

    reports: dict[str, MemoryReport]
    untried: list[str]

    def __str__(self) -> str:
        fitting = {label: report for label, report in self.reports.items() if report.fits}
        rows = [(label, f"{readable(report.reserved or report.peak)} reserved") for label, report in fitting.items()]
        lines = ["also simulated, and fits with:", *("  " + line for line in columns(rows, right=[False, True]))]
        if not fitting:
            taken = {label: report.reserved or report.peak for label, report in self.reports.items()}
            best = min(taken, key=taken.__getitem__, default=None)
            least = "" if best is None else f"; the least is {readable(taken[best])} reserved, with {best}"
            lines = [f"also simulated: {', '.join(self.reports) or 'nothing'}. None fits{least}"]
        return "\n".join([*lines, *([f"not tried, for want of time: {', '.join(self.untried)}"] if self.untried else [])])


def fitting(question: Question, *, seconds: float = SECONDS, clock: Callable[[], float] = monotonic) -> Alternatives:
    """Simulate a run that does not fit with what would save memory, what changes least about it first.

    Args:
        question: The run, with a capacity.
        seconds: After so many no further simulation begins.
        clock: Gives the time in seconds.

    Returns:
        The reports; what cannot be simulated is left out.
    """
    start = clock()
    reports: dict[str, MemoryReport] = {}
    untried: list[str] = []
    enough: list[set[str]] = []
    for parts, changed, method in _candidates(question):
        label = " ".join(parts)
        if any(known <= set(parts) for known in enough):
            continue  # less of it fits already
        if clock() - start >= seconds:
            untried.append(label)
            continue
        say(f"simulating with {label}")
        try:
            reports[label] = simulate(changed, method)
        except LingradError:  # such as a package that is not installed
            continue
        if reports[label].fits:
            enough.append(set(parts))
    return Alternatives(reports, untried)


def _candidates(question: Question) -> Iterator[tuple[list[str], Question, Method | None]]:
    """What is changed, the run, and its method: several changes, single ones, and LoRA."""
    lower = _lower_rank(question.rules)
    single: dict[str, dict[str, Any]] = {}
    if not question.checkpointing:
        single["--checkpointing"] = {"checkpointing": True}
    if not question.layerwise:
        single["--layerwise"] = {"layerwise": True}
    if _base(question) in ("adam", "adamw"):
        single["--base adamw8bit"] = {"base": "adamw8bit"}
    always = list(single)
    if question.offload is None:
        single["--offload moments"] = {"offload": "moments"}
    if lower is not None:
        single[f"--rules {quote(lower)}"] = {"rules": lower}
    if question.batch > 1:
        single["--batch 1"] = {"batch": 1}
    most = [always] if len(always) > 1 else []  # first: where it does not fit, less of it does not
    more = [[*always, label] for label in single if label.startswith(("--rules", "--batch"))]
    for parts in [*most, *([label] for label in single), *([always[:2]] if len(always) > 2 else []), *more]:
        changes: dict[str, Any] = {}
        for part in parts:
            changes |= single[part]
        yield parts, replace(question, **changes), None
    rank = _rank(question.rules)
    if rank is not None and question.ranks == 1:
        label, lora = f"LoRA (PEFT, rank {rank})", Lora(rank, question.base or "adamw")
        yield [label], question, lora
        if not question.checkpointing:
            yield [label, "--checkpointing"], replace(question, checkpointing=True), lora


def _base(question: Question) -> object:
    named = method_of(question.rules)
    return question.base or ("adamw" if named is None else named.base)


def _rank(rules: str) -> int | None:
    """The one rank of a config string; None where there is none, or several."""
    rank = getattr(parse_rules(long_rules(rules)), "rank", None)
    return rank if isinstance(rank, int) else None


def _lower_rank(rules: str) -> str | None:
    """The rules with a quarter of the rank; None where there is no one rank, or it is small already."""
    found: Any = parse_rules(long_rules(rules))
    rank = _rank(rules)
    if rank is None or rank < 8 or method_of(rules) is not None:
        return None
    return spec.format(replace(found, rank=rank // 4))
