"""Rows of JSON or Parquet files, and how a task deals them out: some to train on, others to judge by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lingrad.errors import DataError, in_short, optional
from lingrad.files.reading import MARK, open_plain, parse_json, read_text

Row = TypeVar("Row")
SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """Read the rows of a file.

    Args:
        path: JSON lines, a JSON list, or Parquet (by its name), whose rows are mappings.
        *columns: Keys that every row must have. Of Parquet no other columns are read, unless none is given.

    Returns:
        The rows, in the order of the file.

    Raises:
        DataError: It cannot be read, is of another format, or a row lacks a key.
    """
    rows = _parquet(path, columns) if path.suffix == ".parquet" else _json(path)
    for number, row in enumerate(rows, start=1):
        missing = columns if not isinstance(row, dict) else [key for key in columns if key not in row]
        if missing or not isinstance(row, dict):
            has = f"its keys are {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else "it is no mapping"
            raise DataError(f"{path}, row {number}: expected {_named(columns)} in every row; {has}")
    return rows


def _parquet(path: Path, columns: Sequence[str]) -> list[Any]:
    parquet = optional("pyarrow.parquet", "reading Parquet", "trl")
    try:
        with open_plain(path) as file:
            table = parquet.ParquetFile(file)
            names = set(table.schema_arrow.names)
            wanted = [name for name in columns if name in names] if columns else None
            rows: list[Any] = table.read(columns=wanted).to_pylist()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # of Arrow, whose errors have many classes
        raise DataError(f"{path} is no Parquet file that can be read: {in_short(error)}") from error
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path} has no column {_named(missing)}; its columns are {', '.join(sorted(names))}")
    return rows


def _json(path: Path) -> list[Any]:
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            found: list[Any] = parse_json(text)
            return found
        lines = text.split("\n")  # other line ends may stand inside a JSON string
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    rows = []
    lines = [line.removeprefix(MARK) for line in lines]  # files that were joined have one at the start of each
    for number, line in enumerate(lines, start=1):
        try:
            rows += [parse_json(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            why = f"{path}, line {number} is no JSON: {error}"
            raise DataError(f"{why}; expected a JSON list, or JSON lines: one row in each") from error
    return rows


def _named(names: Sequence[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def deal(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Shuffle rows in an order that is the same for all runs, and deal them out.

    Args:
        rows: Three rows or more.

    Returns:
        ``final``, a fifth, ``tuning``, a tenth, and ``training``, the others.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    tenth = max(1, len(rows) // 10)
    bounds = {"final": (0, 2 * tenth), "tuning": (2 * tenth, 3 * tenth), "training": (3 * tenth, len(rows))}
    return {part: [rows[i] for i in order[first:last]] for part, (first, last) in bounds.items()}


def shuffled(rows: Sequence[Row], *, steps: int, size: int, seed: int) -> Iterator[list[Row]]:
    """Batches of rows, in a new order each time all were seen.

    Args:
        rows: The rows.
        steps: How many batches.
        size: Rows of a batch.
        seed: Of the orders.

    Yields:
        The rows of a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[i] for i in order[:size]]
        order = order[size:]
