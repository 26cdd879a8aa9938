"""Linear layers that act on one input: one right basis Q and one saved X Q can serve them all.

Their weights [m_i, n] are read as one tall weight [sum of m_i, n], for which the transform chooses its basis; coordinates
stay apart, [m_i, r] each. Nothing in the duality asks that the inputs be the same: where they are not, the basis is still
shared, and each layer reduces its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from lingrad.config.targets import Target
from lingrad.errors import ShapeError, SpecError

Share = Literal["input"]

# Names of layers that read the same input, in the packages people train; all of one module.
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


class Place(NamedTuple):
    """A weight among those that share its basis.

    Args:
        target: The weight.
        group: All of them, in the order of the model; the first one leads. One, where nothing is shared.
    """

    target: Target
    group: tuple[Target, ...]

    @property
    def leads(self) -> bool:
        """Whether the basis, and what is saved of the input, is counted here."""
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


def places(targets: Sequence[Target], share: Share | None) -> list[Place]:
    """The targets, each with those that share its basis.

    Args:
        targets: In the order of the model.
        share: ``input``, or None to keep all apart.

    Returns:
        A place for each target, in their order. Layers are grouped where their module has them under the names of one of
        `FAMILIES`, their transforms are equal, and its basis of the tall weight is on the right side.
    """
    groups: dict[object, list[Target]] = {}
    keys = [_key(target) if share else target.name for target in targets]
    for target, key in zip(targets, keys, strict=True):
        groups.setdefault(key, []).append(target)
    found = []
    for target, key in zip(targets, keys, strict=True):
        group = tuple(groups[key])
        found.append(Place(target, group if len(group) == 1 or _on_the_right(Place(target, group)) else (target,)))
    return found


def require_shared(found: Sequence[Place]) -> None:
    """Make sure that something is shared.

    Args:
        found: What `places` found.

    Raises:
        SpecError: Nothing is.
    """
    if not any(len(place.group) > 1 for place in found):
        known = "; ".join(", ".join(family) for family in FAMILIES)
        raise SpecError(
            "share='input' finds nothing to share: it takes linear layers of one module with one transform, whose basis is on "
            f"the right side (side=right, or short where n is below the sum of m), under names such as {known}. Leave it out",
            option="share",
        )


def _key(target: Target) -> object:
    parent, _, layer = target.name.removesuffix(".weight").rpartition(".")
    family = next((i for i, family in enumerate(FAMILIES) if layer in family), None)
    if family is None or target.route == "weight":
        return target.name
    return parent, family, target.layout.shape[1], target.transform


def _on_the_right(place: Place) -> bool:
    try:
        left, right = place.target.transform.ranks(place.shape)
    except ShapeError:
        return False
    return left is None and right is not None
