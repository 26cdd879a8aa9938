"""Linear layers that act on one input can share one right basis Q and one saved X Q.

Their weights [m_i, n] are read as one tall weight [sum of m_i, n], for which the transform chooses its basis; each has its own
coordinates [m_i, r]. The duality does not need the inputs to be equal: if they differ, the basis is still shared, and each
layer reduces its own input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lingrad.config.settings import Share
from lingrad.config.targets import Target
from lingrad.errors import ShapeError, SpecError

# Names of the layers of one module that read the same input, in widely used packages.
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


class GroupedTarget(NamedTuple):
    """A weight, and the group of weights that share its basis.

    Args:
        target: The weight.
        group: The weights with this basis, in the order of the model; only this one if nothing is shared.
    """

    target: Target
    group: tuple[Target, ...]

    @property
    def is_first(self) -> bool:
        """Whether it is the first of its group: the one for which the basis and the saved input are counted."""
        return self.target is self.group[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape for which the basis is chosen, (sum of m_i, n)."""
        return sum(target.layout.shape[0] for target in self.group), self.target.layout.shape[1]

    @property
    def coords(self) -> tuple[int, int]:
        """The shape of the weight's own coordinates."""
        p, q = self.target.transform.coords_shape(self.shape)
        return (p if len(self.group) == 1 else self.target.layout.shape[0]), q


def group_targets(targets: Sequence[Target], share: Share | None) -> list[GroupedTarget]:
    """The targets, each with those that share its basis.

    Args:
        targets: The targets, in the order of the model.
        share: ``input``, or None for a basis each.

    Returns:
        One for each target, in their order. Layers form a group if their module has them under the names of one of `FAMILIES`,
        their transforms are equal, and the basis of the tall weight is on the right side.
    """
    groups: dict[object, list[Target]] = {}
    keys = [_key(target) if share else target.name for target in targets]
    for target, key in zip(targets, keys, strict=True):
        groups.setdefault(key, []).append(target)
    found = []
    for target, key in zip(targets, keys, strict=True):
        group = tuple(groups[key])
        found.append(
            GroupedTarget(target, group if len(group) == 1 or _on_the_right(GroupedTarget(target, group)) else (target,))
        )
    return found


def require_shared(found: Sequence[GroupedTarget]) -> None:
    """Make sure that something is shared.

    Args:
        found: What `group_targets` returned.

    Raises:
        SpecError: Nothing is.
    """
    if not any(len(grouped.group) > 1 for grouped in found):
        known = "; ".join(", ".join(family) for family in FAMILIES)
        raise SpecError(
            "share='input' finds nothing to share: it takes linear layers of one module with one transform, whose basis is on "
            f"the right side (side=right, or short where n is below the sum of m), under names such as {known}. Leave it out",
            option="share",
        )


def _key(target: Target) -> object:
    parent, _, layer = target.name.removesuffix(".weight").rpartition(".")
    family = next((i for i, family in enumerate(FAMILIES) if layer in family), None)
    if family is None or target.route == "weight" or target.transform.blocks > 1:
        return target.name
    return parent, family, target.layout.shape[1], target.transform


def _on_the_right(grouped: GroupedTarget) -> bool:
    try:
        left, right = grouped.target.transform.ranks(grouped.shape)
    except ShapeError:
        return False
    return left is None and right is not None
