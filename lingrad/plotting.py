"""Figures by matplotlib, which is imported when a figure is made; pictures are written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lingrad.errors import optional
from lingrad.files.atomic import write_whole

DOTS = 120  # per inch


def figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, list[Any]]:
    """An empty figure.

    Args:
        size: Width and height in inches, at 120 dots per inch.
        columns: Number of axes, side by side.

    Returns:
        The figure and its axes. Raises `DependencyError` if matplotlib is not installed.
    """
    made = optional("matplotlib.figure", "plotting", "plot").Figure(figsize=size, dpi=DOTS, layout="constrained")
    return made, list(made.subplots(1, columns, squeeze=False)[0])


def picture(figure: Any, suffix: str = ".png") -> bytes:
    """A figure as the bytes of a picture. PNG has no metadata of matplotlib, so that equal figures give equal files.

    Args:
        figure: The figure.
        suffix: The format, such as ``.svg``; empty means ``.png``.

    Returns:
        The bytes. Raises ``ValueError`` if matplotlib does not know the format.
    """
    kind = suffix.lstrip(".") or "png"
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Software": None} if kind == "png" else None)
    return buffer.getvalue()


def save(figure: Any, path: Path) -> Path:
    """Write a figure.

    Args:
        figure: The figure.
        path: The file; its suffix decides the format.

    Returns:
        The path.
    """
    return write_whole(path, picture(figure, path.suffix))
