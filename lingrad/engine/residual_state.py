"""What a rule for the part of a gradient that its basis drops keeps between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lingrad.config.residual import Residual
from lingrad.engine.moments import Moments
from lingrad.maps import LinearMap
from lingrad.subspaces.subspace import Subspace


class _Lost(NamedTuple):
    """The part of a mean of gradients that a change of basis has lost: old.lift(before) - new.lift(after)."""

    old: LinearMap
    before: Tensor
    new: LinearMap
    after: Tensor


class ResidualState:
    """What a rule keeps between steps.

    Args:
        rule: The rule.

    Attributes:
        norms: Of ``scaled``: |step along R| / learning rate of the last step, 0-d, by weight; 0 before there was one.
        factors: Of the step that is being made, by weight: by how much its gradient was scaled since the backward.
        errors: Of ``feedback``: what is added to the next gradient, [m, n] in the weight's dtype, by weight.
    """

    def __init__(self, rule: Residual) -> None:
        self.rule = rule
        self.norms: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}
        self.factors: dict[str, float] = {}
        self._lost: dict[str, _Lost] = {}

    def tensors(self) -> Iterator[Tensor]:
        """All that is held between steps."""
        yield from self.norms.values()
        yield from self.errors.values()

    def entries(self, sub: Subspace) -> dict[str, Tensor]:
        """What a checkpoint holds of one weight, by name; made where there is nothing yet.

        Args:
            sub: The weight's subspace.

        Returns:
            Name -> tensor, not copied.
        """
        if not sub.basis.chance:  # nothing is dropped
            return {}
        if self.rule.kind == "scaled":
            zero = sub.coords.detach().new_zeros(())
            self.norms[sub.name] = self.norms.get(sub.name, zero).to(zero)
            return {"norm": self.norms[sub.name]}
        return {"error": self.error(sub)} if self.rule.kind == "feedback" else {}

    def load(self, sub: Subspace, entries: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds of one weight.

        Args:
            sub: The weight's subspace.
            entries: As `entries` gives them.
        """
        for key, kept in (("norm", self.norms), ("error", self.errors)):
            if key in entries:
                kept[sub.name] = entries[key].to(sub.coords.device, copy=True)

    def error(self, sub: Subspace) -> Tensor:
        """What is added to a weight's next gradient, [m, n]."""
        dtype, device = sub.weight.dtype, sub.coords.device
        if sub.name not in self.errors:
            self.errors[sub.name] = torch.zeros(sub.weight.layout.shape, dtype=dtype, device=device)
        self.errors[sub.name] = self.errors[sub.name].to(device, dtype)  # where model.to has moved or cast the weight
        return self.errors[sub.name]

    def changed(self, sub: Subspace, old: LinearMap, new: LinearMap, moments: Moments, carried: dict[str, Tensor]) -> None:
        """Note what a change of basis loses of the base's mean of gradients, b / (1 - b) (S_old m - S_new m').

        So much of past gradients would still have been stepped (LDAdam, section 3.3).

        Args:
            sub: The weight's subspace.
            old: The map in use.
            new: The map to come.
            moments: The base's moments, not changed yet.
            carried: What takes their place, where they are carried over.
        """
        mean = moments.mean() if self.rule.kind == "feedback" else None
        if mean is None:
            return
        key, rate, before = mean
        after = torch.zeros_like(before) if moments.carry == "reset" else carried.get(key, before)
        weight = rate / (1.0 - rate)
        self._lost[sub.name] = _Lost(old, before * weight, new, after * weight)

    def settle(self, sub: Subspace) -> None:
        """Add what a change of basis has lost to the next gradient.

        Args:
            sub: The weight's subspace.
        """
        lost = self._lost.pop(sub.name, None)
        if lost is not None:
            self.error(sub).add_(lost.old.lift(lost.before)).sub_(lost.new.lift(lost.after))
