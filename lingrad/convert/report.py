"""What a conversion found, module by module, as a table and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lingrad.console import align

FILE = "lingrad_report.json"


@dataclass(frozen=True)
class Row:
    """One tensor whose value changed.

    Args:
        name: The parameter's name.
        kind: ``low_rank``, or ``full`` where it is saved as it is.
        shape: Its shape.
        rank: Columns of its factors; 0 where it is saved as it is.
        kept: The share of BASE in TUNED; 1 where no decoupled decay was recognised.
        residual: |TUNED - (BASE + B A)|_F / |TUNED - BASE|_F, of the file that was written, in float64.
        without_decay: |TUNED - (kept * BASE + B A)|_F / |TUNED - BASE|_F; equal to ``residual`` without decay.
        floor: What rounding TUNED to its dtype once leaves, as the same share.
        full_rank: Whether the rank is that of any matrix of the shape.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int = 0
    kept: float = 1.0
    residual: float = 0.0
    without_decay: float = 0.0
    floor: float = 0.0
    full_rank: bool = False


@dataclass(frozen=True)
class Report:
    """What was converted.

    Args:
        rows: One for each tensor that changed.
        equal: How many tensors did not.
        residual: |all of TUNED - (BASE + B A)|_F / |all of TUNED - BASE|_F, over the low-rank modules.
        nbytes: Bytes of the adapter's weights.
        model_bytes: Bytes of TUNED's.
        goal: What was asked for, in words.
        searched: Whether the rank was to be found, down to rounding.
        logits: The largest difference of a logit between TUNED and BASE with the adapter, through PEFT, and the largest logit;
            None where it was not asked for.
    """

    rows: tuple[Row, ...]
    equal: int
    residual: float
    nbytes: int
    model_bytes: int
    goal: str
    searched: bool = True
    logits: tuple[float, float] | None = None

    @property
    def decayed(self) -> list[Row]:
        """The rows where decoupled decay was recognised."""
        return [row for row in self.rows if row.kept != 1.0]

    def json(self) -> str:
        """All of it, for the folder; equal conversions give equal texts."""
        fields: dict[str, Any] = asdict(self) | {"notes": self.notes()}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def notes(self) -> list[str]:
        """What a reader must know, a sentence each."""
        found = []
        low, decayed = [row for row in self.rows if row.kind == "low_rank"], self.decayed
        if decayed:
            kept = _span([row.kept for row in decayed])
            found.append(
                f"Decoupled weight decay: {len(decayed)} of {len(low)} low-rank modules are kept * BASE + low rank, kept being "
                f"{kept}. PEFT adds an adapter to the whole of BASE and cannot express that. On a base whose weights are "
                "multiplied by kept the residual is that 'without decay'; --decayed-base DIR writes one. Or ask for all of it, "
                "at a larger rank, with --rank, --energy or --max-error."
            )
        noisy = [row for row in low if row.without_decay > 0.02 and not row.full_rank]
        if noisy and self.searched:
            worst = max(row.without_decay for row in noisy)
            found.append(
                f"What is left of {len(noisy)} of {len(low)} modules is up to {worst:.1%} of their change, spread "
                "over all directions as rounding at every step of a training leaves it; no rank short of the full one holds it."
            )
        if any(row.full_rank for row in low):
            count = sum(row.full_rank for row in low)
            found.append(
                f"{count} of {len(low)} modules changed by a matrix of full rank: its factors are larger than the weight. "
                "TUNED was not trained in few low-rank subspaces, or was rounded at every step. Give --rank, --energy or "
                "--max-error to keep a part, or use TUNED as it is."
            )
        if self.nbytes > self.model_bytes:
            found.append(f"The adapter is larger than the model, {self.nbytes:,} against {self.model_bytes:,} bytes.")
        return found

    def table(self) -> str:
        """The rows as text, those in one line that differ in the number of a layer only, and what must be known of them."""
        headers = ["tensor", "shape", "rank", "kept", "residual", "without decay", "rounding"]
        shown = [i for i, header in enumerate(headers) if self.decayed or header not in ("kept", "without decay")]
        alike: dict[tuple[str, str, tuple[int, ...]], list[Row]] = {}
        for row in self.rows:
            alike.setdefault((re.sub(r"\.\d+\.", ".*.", row.name), row.kind, row.shape), []).append(row)
        cells = [headers, *(_cells(name, rows) for (name, _, _), rows in alike.items())]
        cells = [[row[i] for i in shown] for row in cells]
        lines = ["  ".join(row).rstrip() for row in align(cells, [bool(i) for i in shown])]
        changed = f"{len(self.rows)} tensors changed, {self.equal} did not"
        lines.append(f"{changed}; residual of all low-rank modules {self.residual:.1e}; {self.nbytes:,} bytes ({self.goal})")
        if self.logits is not None:
            lines.append(f"logits through PEFT differ by {self.logits[0]:.1e} at most, the largest being {self.logits[1]:.1f}")
        return "\n".join([*lines, *self.notes()])


def _cells(name: str, rows: Sequence[Row]) -> list[str]:
    shape = " x ".join(map(str, rows[0].shape))
    title = f"{name} (x {len(rows)})" if len(rows) > 1 else name
    if rows[0].kind == "full":
        return [title, shape, "whole", "", "0", "0", ""]
    residual, without, floor = (
        f"{max(getattr(row, what) for row in rows):.1e}" for what in ("residual", "without_decay", "floor")
    )
    return [title, shape, _span([row.rank for row in rows]), _span([row.kept for row in rows]), residual, without, floor]


def _span(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.6g}", f"{max(numbers):.6g}"
    return low if low == high else f"{low} to {high}"
