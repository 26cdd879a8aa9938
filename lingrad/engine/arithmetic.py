"""Reproducing another program's arithmetic to the last digit, where it differs from lingrad's in details.

``galore`` is galore_torch 1.0. Beside the algorithm (Zhao et al., ICML 2024, arXiv 2403.03507) its AdamW adds eps before the
bias correction, decays after the step, takes the SVD in float32 and leaves the signs of a new basis as the SVD gave them. Its
8-bit AdamW is bitsandbytes' and decays after the step too; its Adafactor decays before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lingrad.config import spec
from lingrad.config.settings import Compat
from lingrad.errors import SpecError
from lingrad.transforms import SVD, Transform

# Of a param group, what the base optimizer must not get as it is: the run's own, fixed when it was built, or set in `sync_to`.
OWN = {"params", "param_names", "name", "kind", "scale", "specs", "weight_decay", "lr", "eps", "fused", "foreach"}


@dataclass(frozen=True)
class Arithmetic:
    """The details of a step that other programs do differently.

    Args:
        decay_last: Decay after the base's step instead of before.
        eps_uncorrected: eps is added to the uncorrected second moment, as if it were eps / sqrt(1 - b2^t).
        default_eps: The base's eps where the user gives none; None leaves the base's own.
    """

    decay_last: bool = False
    eps_uncorrected: bool = False
    default_eps: float | None = None

    def eps(self, group: Mapping[str, Any], step: int) -> float:
        """The eps for torch's Adam in its ``step``-th step, counted from 1."""
        eps: float = group["eps"]
        return eps / math.sqrt(1 - group["betas"][1] ** step) if self.eps_uncorrected else eps


LINGRAD = Arithmetic()
_GALORE_ADAMW = Arithmetic(decay_last=True, eps_uncorrected=True, default_eps=1e-6)
GALORE = {"adamw": _GALORE_ADAMW, "adam": _GALORE_ADAMW, "adamw8bit": Arithmetic(decay_last=True), "adafactor": LINGRAD}


def arithmetic(compat: Compat | None, base: str) -> Arithmetic:
    """The arithmetic to follow.

    Args:
        compat: ``galore``, or None for lingrad's own.
        base: The name of the base.

    Returns:
        The details.

    Raises:
        SpecError: The base is not one the program has.
    """
    if compat is None:
        return LINGRAD
    if base not in GALORE:
        raise SpecError(
            f"compat='galore' reproduces galore_torch's optimizers; use base='adamw', 'adamw8bit' or 'adafactor', not '{base}'"
        )
    return GALORE[base]


def as_published(compat: Compat | None, transform: Transform) -> Transform:
    """The transform with the numerical choices of the program to reproduce.

    Args:
        compat: ``galore``, or None.
        transform: The transform asked for.

    Returns:
        The same transform under None; for ``galore`` an exact SVD in float32 with unaligned signs.

    Raises:
        SpecError: The program has no such transform.
    """
    if compat is None:
        return transform
    if not isinstance(transform, SVD) or transform.solver != "exact":
        raise SpecError(
            f"compat='galore' reproduces galore_torch, which has svd with the exact solver only, not {spec.format(transform)}"
        )
    return replace(transform, precision="float32", align=False)


def unfit_rate(groups: list[dict[str, Any]], fits: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any] | None, str]:
    """Find a param group whose learning rate a compiled or captured step could not follow.

    Args:
        groups: The run's param groups.
        fits: Whether that of a group is such that it can.

    Returns:
        The first such group, None where there is none, and the option that gives its learning rate: ``rest_lr`` where it trains
        in full and the learning rate of coordinates fits.
    """
    unfit = [group for group in groups if not fits(group)]
    coords = [group for group in groups if group["kind"] == "coords"]
    rest = bool(coords) and all(map(fits, coords))
    return (unfit[0] if unfit else None), ("rest_lr" if rest else "lr")


def sync_to(own: Mapping[str, Any], group: dict[str, Any], arithmetic: Arithmetic, step: int) -> None:
    """Copy a param group's hyper-parameters, which schedulers change, to the base optimizer's.

    Args:
        own: The run's group.
        group: The optimizer's, changed in place.
        arithmetic: Details of the step.
        step: The step about to be made, counted from 1.
    """
    for key in group.keys() - OWN:
        if key in own:
            group[key] = own[key]
    if "eps" in group:
        group["eps"] = arithmetic.eps(own, step)
    group["lr"] = own["lr"] * own.get("scale", 1.0)
