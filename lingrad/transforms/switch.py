"""`switch`: singular vectors of the gradient at first, random ones later (GoLore: He et al., ICML 2025, arXiv 2410.11289)."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor
from typing_extensions import override

from lingrad.errors import require
from lingrad.gradients.base import Gradient
from lingrad.transforms.base import Reads, When
from lingrad.transforms.linalg import derive_seed
from lingrad.transforms.random import random_basis
from lingrad.transforms.registry import register
from lingrad.transforms.side import Sides, SideTransform
from lingrad.transforms.svd import SVD


@register("switch")
@final
class Switch(SideTransform):
    """The bases of `svd` until ``after`` steps are finished, and random ones, as those of `random`, from then on.

    Late in training the leading singular vectors are those of the noise, which a random basis does not know (He et al.). The
    gradient is read at each refresh, early and late.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        after: The first refresh after so many finished steps, and all later ones, draw the basis at random; 0 draws them all.
        solver: As that of `svd`; ``randomized`` uses each basis from the next step on, the random ones too.
        kind: The random basis: ``orthonormal``, ``gaussian`` or ``rademacher``.

    Raises:
        SpecError: An option is out of range.
    """

    after: int
    solver: Literal["exact", "gram", "randomized"] = "exact"
    kind: Literal["orthonormal", "gaussian", "rademacher"] = "orthonormal"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.after >= 0, "after", f"after must be 0 (random from the start) or more steps, not {self.after}")

    @property
    @override
    def reads(self) -> Reads:
        return self._early.reads

    @property
    def _early(self) -> SVD:
        return SVD(rank=self.rank, every=self.every, side=self.side, clip=self.clip, solver=self.solver)

    @override
    def columns(self, rank: int) -> int:
        return self._early.columns(rank)

    @override
    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        if when.step < self.after:
            return self._early.basis(seen, old, when)
        seed = derive_seed(when.seed, when.step, when.side)
        return random_basis(self.kind, *old.shape, seed=seed, template=old)

    @override
    def bases(self, grad: Gradient, old: Sides, when: When) -> Sides:
        return self._early.bases(grad, old, when) if when.step < self.after else super().bases(grad, old, when)
