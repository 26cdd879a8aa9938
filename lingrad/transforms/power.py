"""`power`: warm-started subspace iteration, one product a side (PowerSGD, Vogels et al. 2019, arXiv 1905.13727, section 3)."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.gradients.local import DenseGradient
from lingrad.tensors import TensorSpec
from lingrad.transforms.base import Probe, Sketch, When
from lingrad.transforms.linalg import align_signs, derive_seed, orthonormalize
from lingrad.transforms.registry import register
from lingrad.transforms.side import Sides, SideTransform


class Iterated(NamedTuple):
    """State of `Power`: the bases, and for a basis on one side its companion on the other."""

    left: Tensor | None
    right: Tensor | None
    companion: Tensor | None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """P [m, r] and Q [n, r], whichever of them is the companion."""
        left = self.companion if self.left is None else self.left
        right = self.companion if self.right is None else self.right
        assert left is not None  # noqa: S101 - one of three is missing
        assert right is not None  # noqa: S101
        return left, right


@register("power")
@final
class Power(SideTransform):
    """Subspace iteration on both sides at once: P <- qr(G Q), Q <- qr(G^T P), each with the other's old basis.

    Both old bases are fixed before the step, so that the products add up over micro-batches. If the weight has a basis on one
    side only, the one on the other is a companion, stored for the next refresh. Its product is the coordinates' own gradient.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        schedule: What decides every ``every`` steps whether to refresh: ``energy()``, ``overlap()``, ``path()``; or None.

    Raises:
        SpecError: An option is out of range.
    """

    reads = "sketch"

    @override
    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        return align_signs(orthonormalize(seen.dense(), seed=derive_seed(when.seed, when.step, when.side)), old)

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Iterated:
        left, right = self.start(shape, seed=seed, device=device, dtype=dtype)
        size, rank = self._companion(shape)
        if rank is None:
            return Iterated(left, right, None)
        return Iterated(left, right, self.drawn(size, rank, seed=derive_seed(seed, "companion"), device=device, dtype=dtype))

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        size, rank = self._companion(shape)
        return [*super().storage(shape, dtype), *([] if rank is None else [TensorSpec((size, rank), dtype)])]

    @override
    def probes(self, state: Iterated, when: When) -> tuple[Probe, ...]:
        left, right = state.pair
        return Probe(None, right), Probe(left, None)

    @override
    def learn(self, state: Iterated, sketch: Sketch, when: When) -> Iterated:
        seen = DenseGradient(sketch[0]), DenseGradient(sketch[1]).T
        left, right = self.each_side(seen, Sides(*state.pair), when)
        if state.right is None:
            return Iterated(left, None, right)
        return Iterated(None, right, left) if state.left is None else Iterated(left, right, None)

    def _companion(self, shape: tuple[int, int]) -> tuple[int, int | None]:
        """Size and rank of the basis on the side that is not reduced."""
        p, q = self.ranks(shape)
        return (shape[1], p) if q is None else (shape[0], q if p is None else None)
