"""What an export says of itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lingrad.console import align


@dataclass(frozen=True)
class Row:
    """The change of one weight.

    Args:
        name: The parameter's name.
        rank: The rank of its adapter, of each expert where several are fused.
        change: |W_now - W_base| / |W_base|, Frobenius.
        residual: |W_now - (W_base + B A)| / |W_now - W_base|, B A as PEFT has it; 0 where nothing changed.
        kept: What weight decay has left of the weight, 1 without decay.
        nbytes: Bytes of its factors.
    """

    name: str
    rank: int
    change: float
    residual: float
    kept: float
    nbytes: int


@dataclass(frozen=True)
class Report:
    """An export that was loaded by PEFT and compared with the run.

    Args:
        path: The adapter's folder.
        base: What the weights without the adapter were taken from.
        inputs: What both models were run on.
        rows: One for each weight with a low-rank change.
        whole: Names of the modules saved whole; each came back bit for bit.
        beside: Names of the parameters saved by themselves; likewise.
        outputs: The largest difference of PEFT's outputs from the run's; None where there were no inputs.
        outputs_change: The largest difference that the adapter makes to the outputs; None likewise.
        nbytes: Bytes of ``adapter_model.safetensors``.
        notes: What else there is to know.
    """

    path: str
    base: str
    inputs: str
    rows: tuple[Row, ...]
    whole: tuple[str, ...]
    beside: tuple[str, ...]
    outputs: float | None
    outputs_change: float | None
    nbytes: int
    notes: tuple[str, ...] = ()

    @property
    def residual(self) -> float:
        """The largest relative residual of any weight."""
        return max((row.residual for row in self.rows), default=0.0)

    def json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self) | {"residual": self.residual}, indent=2) + "\n"

    def __str__(self) -> str:
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", row.name), []).append(row)
        table = [("weight", "number", "rank", "kB", "change", "residual")]
        for name, rows in groups.items():
            table.append(
                (
                    name,
                    str(len(rows)),
                    _span([row.rank for row in rows]),
                    f"{sum(row.nbytes for row in rows) / 1000:,.1f}",
                    f"{max(row.change for row in rows):.1e}",
                    f"{max(row.residual for row in rows):.1e}",
                )
            )
        lines = ["  ".join(cells).rstrip() for cells in align(table, (False, True, True, True, True, True))]
        for title, saved in (("saved whole", self.whole), ("saved beside", self.beside)):
            if saved:
                lines.append(f"{title}: {', '.join(_short(saved))}")
        lines.append(f"compared with: {self.base}")
        if self.outputs is None or self.outputs_change is None:
            lines.append(f"outputs: not compared; {self.inputs}")
        else:
            lines.append(
                f"outputs on {self.inputs}: PEFT's differ by at most {self.outputs:.1e}; the adapter changes them by up to "
                f"{self.outputs_change:.1e}"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"written: {self.path} ({self.nbytes / 1e6:,.2f} MB)"])

    def write(self, folder: Path) -> None:
        """Write it as ``lingrad_report.json``.

        Args:
            folder: Where to.
        """
        (folder / "lingrad_report.json").write_text(self.json())


def ratio(part: float, whole: float) -> float:
    """A quotient, 0 where both are 0."""
    return part / whole if whole else (math.inf if part else 0.0)


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _short(names: Sequence[str]) -> list[str]:
    """Names with their layer's number left out, each once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
