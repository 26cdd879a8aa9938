"""Figures by matplotlib, which is imported when one is drawn; a picture is written in full or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lingrad.errors import optional
from lingrad.files.atomic import write_whole

DOTS = 120  # an inch


def figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, list[Any]]:
    """An empty figure.

    Args:
        size: Width and height in inches, of 120 dots each.
        columns: Axes next to each other.

    Returns:
        The figure and its axes. Raises `DependencyError` where matplotlib is not installed.
    """
    made = optional("matplotlib.figure", "plotting", "plot").Figure(figsize=size, dpi=DOTS, layout="constrained")
    return made, list(made.subplots(1, columns, squeeze=False)[0])


def picture(figure: Any, suffix: str = ".png") -> bytes:
    """A figure as the bytes of a file; of PNG without the program's name, so that equal figures give equal files.

    Args:
        figure: The figure.
        suffix: The kind of file, ``.png`` where empty.

    Returns:
        The bytes. Raises ``ValueError`` where matplotlib does not know the kind.
    """
    kind = suffix.lstrip(".") or "png"
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Software": None} if kind == "png" else None)
    return buffer.getvalue()


def save(figure: Any, path: Path) -> Path:
    """Write a figure.

    Args:
        figure: The figure.
        path: The file; its suffix says of what kind.

    Returns:
        The path.
    """
    return write_whole(path, picture(figure, path.suffix))
