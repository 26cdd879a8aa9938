"""Columns of text that line up."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[list[str]]:
    """Pad the cells of every column to one width.

    Args:
        rows: Cells, each row as long as the others.
        right: Which columns are figures, to stand at the right.

    Returns:
        The padded cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)] for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up.

    Args:
        rows: Cells, each row as long as the others; the first is the header. The first column is text, the others are figures.

    Returns:
        Lines with a final newline.
    """
    right = [i > 0 for i in range(len(rows[0]))]
    header, *rest = align(rows, right)
    rule = ["-" * (len(cell) - 1) + (":" if figures else "-") for cell, figures in zip(header, right, strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rest))
