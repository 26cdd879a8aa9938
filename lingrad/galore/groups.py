"""A param group of galore_torch, translated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lingrad.config import spec
from lingrad.errors import ShapeError, did_you_mean, require, shown
from lingrad.galore.names import SIDES
from lingrad.transforms import SVD

_NEEDED = ("rank", "update_proj_gap", "scale", "proj_type")  # of a param group that is projected


def require_only(option: str, value: object, supported: object, why: str) -> None:
    """Make sure that an argument has the one value that is supported.

    Args:
        option: Its name.
        value: The value given.
        supported: The value that is supported.
        why: Why no other is, and what to do.
    """
    require(value == supported, option, f"{option} must be {supported}, not {shown(value)}: {why}")


def translated(index: int, group: dict[str, Any], options: tuple[str, ...]) -> dict[str, Any]:
    """A param group of galore_torch as one of lingrad.

    Args:
        index: Its place, for the names of its parameters.
        group: The group, with defaults filled in.
        options: The names of the hyper-parameters that the base takes.

    Returns:
        The group with names and rules; parameters that are frozen are left out.

    Raises:
        SpecError: An entry is wrong, missing, or not supported.
        ShapeError: A parameter that is to be projected is no matrix.
    """
    names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
    own: list[tuple[str, Tensor]] = [(n, p) for n, p in zip(names, group["params"], strict=True) if p.requires_grad]
    taken: dict[str, Any] = {"params": own, **{name: group[name] for name in options}}
    if "rank" not in group:
        odd = [name for name in group if name in _NEEDED]
        require(not odd, "rank", f"param group {index} has {', '.join(odd)} and no rank; give it one, or leave the others out")
        return taken | {"rules": {"*": "none"}}
    missing = [name for name in _NEEDED if name not in group]
    require(not missing, "rank", f"param group {index} has a rank, and lacks {', '.join(missing)}")
    side, gap = group["proj_type"], group["update_proj_gap"]
    require(
        isinstance(side, str) and side in SIDES,
        "proj_type",
        f"proj_type must be one of {', '.join(SIDES)}, not {shown(side)}{did_you_mean(str(side), SIDES)}",
    )
    require(isinstance(gap, int) and gap >= 1, "update_proj_gap", f"update_proj_gap counts steps, 1 or more, not {shown(gap)}")
    require(not group.get("proj_quant"), "proj_quant", "proj_quant is not supported; bases in codes are coded(each=svd(...))")
    for name, param in own:
        if param.dim() != 2:
            raise ShapeError(
                f"parameter '{name}' of param group {index} has shape {tuple(param.shape)}; a group with a rank projects "
                "matrices [m, n] only. Put it into a group without rank; lingrad.wrap reads other shapes as matrices"
            )
    transform = SVD(rank=group["rank"], every=gap, side=SIDES[side], clip=True)  # type: ignore[arg-type]
    return taken | ({"rules": spec.format(transform), "scale": group["scale"]} if own else {})
