"""The report of an adapter: one schema for every writer, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lingrad.console import columns, layers, span
from lingrad.errors import DataError
from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_json

FILE = "lingrad_report.json"
VERSION = 1  # of the JSON; goes up when a key changes its name or its meaning

Writer = Literal["run", "models", "checkpoint"]


@dataclass(frozen=True)
class ChangedTensor:
    """One tensor whose value changed. W is the trained weight, W_start the one it started from; norms are Frobenius norms.

    Args:
        name: The parameter's or buffer's name.
        kind: ``low_rank`` where factors are saved, ``full`` where the value is.
        shape: Its shape.
        nbytes: Bytes of what is saved of it.
        rank: Columns of its factors, of each expert where several are fused; 0 where it is saved in full.
        residual: |W - (W_start + B A)| / |W - W_start|; 0 where nothing changed, and where it is saved in full.
        without_decay: |W - (decay * W_start + B A)| / |W - W_start|, equal to ``residual`` without decay; None where it was not
            measured.
        decay: The factor by which weight decay has multiplied W_start; 1 without decay.
        change: |W - W_start| / |W_start|; None where it was not measured, and where W_start is zero.
        floor: What rounding W to its dtype once leaves, as a share of |W - W_start|; None where it was not measured.
        full_rank: Whether the rank is that of any matrix of this shape.
    """

    name: str
    kind: Literal["low_rank", "full"]
    shape: tuple[int, ...]
    nbytes: int
    rank: int = 0
    residual: float = 0.0
    without_decay: float | None = None
    decay: float = 1.0
    change: float | None = None
    floor: float | None = None
    full_rank: bool = False


@dataclass(frozen=True)
class OutputComparison:
    """The outputs of the trained model, compared with those of the starting model with the adapter, through PEFT.

    Args:
        inputs: What both were run on.
        difference: The largest absolute difference.
        largest: The largest absolute value of the trained model's.
        change: The largest absolute difference that the adapter makes; None where it was not measured.
    """

    inputs: str
    difference: float
    largest: float
    change: float | None = None


@dataclass(frozen=True)
class AdapterReport:
    """What was written into an adapter's folder, and how close it comes to what was trained.

    Args:
        source: What was turned into the adapter: a ``run`` in memory (`lingrad.peft.export`), two ``models``
            (`lingrad.convert.convert`) or a ``checkpoint`` (`lingrad.convert.convert_run`).
        rows: One for each tensor that changed.
        residual: |W - (W_start + B A)| / |W - W_start| over all tensors with factors together.
        nbytes: Bytes of ``adapter_model.safetensors``.
        saved_modules: Names of the modules that are saved in full.
        alongside: Names of the parameters that are saved alongside the adapters, without the rest of their module.
        start: What the weights without the adapter were taken from; None where there was nothing to compare with.
        outputs: The outputs, where they were compared.
        equal: How many tensors did not change, where all were looked at.
        model_bytes: Bytes of the trained model's weights, where they are in files.
        goal: How much of the change was asked for, where that is an option; where that was all of it, and a part is left out,
            how much that is.
        notes: What else a reader must know, a sentence or two each.
        path: The adapter's folder. It is not in the JSON, which lies in that folder.
    """

    source: Writer
    rows: tuple[ChangedTensor, ...]
    residual: float
    nbytes: int
    saved_modules: tuple[str, ...] = ()
    alongside: tuple[str, ...] = ()
    start: str | None = None
    outputs: OutputComparison | None = None
    equal: int | None = None
    model_bytes: int | None = None
    goal: str | None = None
    notes: tuple[str, ...] = ()
    path: str = ""

    @property
    def low_rank(self) -> list[ChangedTensor]:
        """The rows of tensors with factors."""
        return [row for row in self.rows if row.kind == "low_rank"]

    @property
    def largest_residual(self) -> float:
        """The largest residual of any tensor."""
        return max((row.residual for row in self.rows), default=0.0)

    def json(self) -> str:
        """The report as JSON, with the version of its schema; equal reports give equal texts."""
        return json.dumps({"version": VERSION, **_encoded(self, leave_out=("path",))}, indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Write the JSON as ``lingrad_report.json``.

        Args:
            folder: The folder to write into.
        """
        write_whole(folder / FILE, self.json().encode())

    @classmethod
    def read(cls, folder: str | Path) -> AdapterReport:
        """Read the report in an adapter's folder.

        Args:
            folder: The folder.

        Returns:
            The report, equal to the one that was written, with the folder as its ``path``.

        Raises:
            DataError: There is none, it has another version, or it is damaged.
        """
        path = Path(folder) / FILE
        try:
            found = read_json(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; expected the folder of an adapter") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}; write the adapter again") from error
        version = found.pop("version", None) if isinstance(found, dict) else None
        if type(version) is not int or version != VERSION:
            raise DataError(f"{path} has version {version!r}; this lingrad reads version {VERSION}. Write the adapter again")
        try:
            report: AdapterReport = _decoded(cls, {"path": str(folder), **found}, "the report")
        except _DamagedError as error:
            raise DataError(f"{path} is damaged: {error}; write the adapter again") from None
        return report

    def table(self) -> str:
        """The report as text: a line for the tensors that differ only in the number of their layer, then a summary."""
        alike: dict[tuple[str, str, tuple[int, ...]], list[ChangedTensor]] = {}
        for row in self.rows:
            alike.setdefault((layers(row.name), row.kind, row.shape), []).append(row)
        shown = [("tensor", [_title(name, len(rows)) for (name, _, _), rows in alike.items()])]
        for title, cell in _COLUMNS:
            cells = [cell(rows) for rows in alike.values()]
            if title in _ALWAYS or any(cells):
                shown.append((title, cells))
        if all(row.decay == 1.0 for row in self.rows):
            shown = [column for column in shown if column[0] not in ("decay", "without decay")]
        table = list(zip(*([title, *cells] for title, cells in shown), strict=True))
        return "\n".join([*columns(table, [i > 0 for i in range(len(shown))]), *self._summary()])

    def __str__(self) -> str:
        """The table, and where the adapter is."""
        written = f"written: {self.path} ({self.nbytes / 1e6:,.2f} MB)"
        return f"{self.table()}\n{written}" if self.path else self.table()

    def _summary(self) -> list[str]:
        others = "" if self.equal is None else f", {self.equal} did not"
        goal = "" if self.goal is None else f" ({self.goal})"
        lines = [
            f"{len(self.rows)} tensors changed{others}; residual of all low-rank changes {self.residual:.1e}; "
            f"{self.nbytes:,} bytes{goal}"
        ]
        for title, saved in (("modules saved in full", self.saved_modules), ("saved alongside the adapters", self.alongside)):
            if saved:
                lines.append(f"{title}: {', '.join(dict.fromkeys(map(layers, saved)))}")
        if self.start is not None:
            lines.append(f"compared with: {self.start}")
        if self.outputs is not None:
            changed = "" if self.outputs.change is None else f"; the adapter changes them by up to {self.outputs.change:.1e}"
            lines.append(
                f"outputs on {self.outputs.inputs}: through PEFT they differ by at most {self.outputs.difference:.1e}, the "
                f"largest is {self.outputs.largest:.1f}{changed}"
            )
        elif self.source == "run":
            lines.append("outputs: not compared; pass inputs= to have them compared")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def ratio(value: float, total: float) -> float:
    """A quotient, 0 where both are 0."""
    return value / total if total else (math.inf if value else 0.0)


def _title(name: str, count: int) -> str:
    return f"{name} (x {count})" if count > 1 else name


def _largest(rows: Sequence[ChangedTensor], field: str) -> str:
    """The largest value of a figure, empty where none was measured."""
    found = [value for row in rows if (value := getattr(row, field)) is not None]
    return f"{max(found):.1e}" if found else ""


def _of_factors(rows: Sequence[ChangedTensor], text: str, otherwise: str = "") -> str:
    return text if rows[0].kind == "low_rank" else otherwise


# Title -> what to show of tensors that stand in one line. A column is left out where all of its cells are empty.
_COLUMNS: tuple[tuple[str, Callable[[Sequence[ChangedTensor]], str]], ...] = (
    ("shape", lambda rows: " x ".join(map(str, rows[0].shape))),
    ("rank", lambda rows: _of_factors(rows, span([row.rank for row in rows]), "full")),
    ("kB", lambda rows: f"{sum(row.nbytes for row in rows) / 1000:,.1f}"),
    ("change", lambda rows: _largest(rows, "change")),
    ("decay", lambda rows: _of_factors(rows, span([row.decay for row in rows]))),
    ("residual", lambda rows: _of_factors(rows, _largest(rows, "residual"), "0")),
    ("without decay", lambda rows: _of_factors(rows, _largest(rows, "without_decay"), "0")),
    ("rounding", lambda rows: _largest(rows, "floor")),
)
_ALWAYS = ("shape", "rank", "kB", "residual")


class _DamagedError(Exception):
    """What is wrong with a value."""


def _encoded(value: Any, leave_out: Sequence[str] = ()) -> Any:
    """A dataclass as plain JSON values; what is None is left out."""
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in leave_out}
        return {name: _encoded(found) for name, found in named.items() if found is not None}
    return [_encoded(one) for one in value] if isinstance(value, tuple) else value


def _decoded(kind: Any, value: Any, where: str) -> Any:
    """The inverse of `_encoded`, checked against the annotations of the dataclasses."""
    origin = get_origin(kind)
    if origin is UnionType:
        return _decoded(get_args(kind)[0], value, where)  # X | None, and what is None is left out
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise _DamagedError(f"{where} must be an object, not {value!r}")
        hints = get_type_hints(kind)
        needed = {field.name for field in fields(kind) if field.default is MISSING}
        odd = sorted((value.keys() - hints.keys()) | (needed - value.keys()))
        if odd:
            raise _DamagedError(f"{where} {'has the unknown key' if odd[0] in value else 'has no'} '{odd[0]}'")
        return kind(**{key: _decoded(hints[key], found, f"'{key}' of {where}") for key, found in value.items()})  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(value, list):
            raise _DamagedError(f"{where} must be a list, not {value!r}")
        return tuple(_decoded(get_args(kind)[0], one, f"item {i} of {where}") for i, one in enumerate(value))
    if origin is Literal:
        if value not in get_args(kind):
            raise _DamagedError(f"{where} must be one of {', '.join(get_args(kind))}, not {value!r}")
        return value
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise _DamagedError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return kind(value)
