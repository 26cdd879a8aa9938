"""Diagnostics: what is measured of a run besides its losses, by name or of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lingrad.config import spec
from lingrad.errors import SpecError, did_you_mean, in_short, shown
from lingrad.research.diagnostics.base import Diagnostic as Diagnostic
from lingrad.research.diagnostics.base import ObservedRun as ObservedRun
from lingrad.research.diagnostics.bases import BasisOverlap, CapturedEnergy, MomentMismatch, UpdateRank
from lingrad.research.diagnostics.halves import ReproducibleDirections
from lingrad.research.diagnostics.modes import ModeGap, RowOrderGap, SwitchedGap
from lingrad.research.objects import is_object, load_object

DIAGNOSTICS: Mapping[str, Callable[..., Diagnostic]] = {
    "energy": CapturedEnergy,
    "overlap": BasisOverlap,
    "reproducible": ReproducibleDirections,
    "rank": UpdateRank,
    "mismatch": MomentMismatch,
    "gap": ModeGap,
    "gap_switched": SwitchedGap,
    "gap_control": RowOrderGap,
}


def make_diagnostic(text: Any, folder: Path) -> Diagnostic:
    """A diagnostic of a plan.

    Args:
        text: A key of `DIAGNOSTICS`, with options in brackets if it has any, such as ``reproducible(threshold=0.7)``; or
            ``FILE.py:CLASS``.
        folder: What names of files are relative to.

    Returns:
        The diagnostic, for one run.

    Raises:
        SpecError: There is none of that name, or an option is wrong.
    """
    if not isinstance(text, str):
        raise SpecError(f"a diagnostic must be a text, not {shown(text)}", option="diagnostics")
    if is_object(text):
        found = load_object(text, folder)
        if not (isinstance(found, type) and issubclass(found, Diagnostic)):
            raise SpecError(
                f"'{text}' is no diagnostic: it must be a class derived from lingrad.research.Diagnostic", option="diagnostics"
            )
        return _made(found, text, {})
    choice = spec.parse_choice(text)
    if choice.name not in DIAGNOSTICS:
        near = did_you_mean(choice.name, DIAGNOSTICS)
        known = f"Known: {', '.join(DIAGNOSTICS)}, FILE.py:CLASS"
        raise SpecError(f"there is no diagnostic '{choice.name}'{near} {known}", option="diagnostics")
    return _made(DIAGNOSTICS[choice.name], text, dict(choice.options))


def _made(make: Callable[..., Diagnostic], text: str, options: dict[str, Any]) -> Diagnostic:
    try:
        return make(**options)
    except SpecError:
        raise
    except Exception as error:  # an option that it does not take, or code of others
        raise SpecError(f"the diagnostic '{text}' cannot be made: {in_short(error)}", option="diagnostics") from error
