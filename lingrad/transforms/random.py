"""`random`: bases drawn from a seed (Flora, Hao et al., ICML 2024, arXiv 2402.03293; GoLore, arXiv 2410.11289)."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import Gradient
from lingrad.maps import KroneckerMap, LinearMap, SelectionMap
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms.base import When
from lingrad.transforms.linalg import derive_seed, gaussian, orthonormalize, some_of
from lingrad.transforms.registry import register
from lingrad.transforms.side import BasisTransform

Distribution = Literal["gaussian", "rademacher", "orthonormal", "rows"]


class Drawn(NamedTuple):
    """State of `Random`: what is needed to draw the bases again."""

    seed: int
    m: int
    n: int
    p: int | None  # columns of the left basis; None if that side has none
    q: int | None
    like: Tensor  # empty, with the device and dtype of the bases

    @property
    def fixed(self) -> tuple[str, ...]:
        """The fields that a checkpoint must agree on: they are sizes of memory."""
        return ("m", "n", "p", "q")


@register("random")
@final
class Random(BasisTransform):
    """A random basis, regenerated from a seed: a checkpoint holds no basis.

    Columns have unit length (in expectation for ``gaussian``), so that a learning rate and ``scale`` mean the same for every
    transform. Flora's N(0, 1/r) entries (its algorithm 2) are this map times sqrt(m/r), or n/r: multiply ``scale`` by as much
    for Adam, whose steps do not grow with the gradient, and by its square for SGD.

    Args:
        rank: Columns of each basis.
        every: Steps between redraws; 0 draws once (LoRA-FA, with side=right: a frozen random factor).
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        kind: ``gaussian`` N(0, 1/m), ``rademacher`` +-1/sqrt(m), ``orthonormal`` (QR of a Gaussian), or ``rows``: a random
            choice of rows (of columns, on the right side) of the weight, whose map gathers and scatters.
        store: Store the basis between refreshes; false draws it again at each use, which takes time instead of memory.

    Raises:
        SpecError: An option is out of range.
    """

    reads = "nothing"
    uncoded = "it is drawn from a seed; store=false keeps none"

    kind: Distribution = "gaussian"
    store: bool = True

    @property
    @override
    def stores_map(self) -> bool:
        return self.store

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        return super().basis_shapes(shape) if self.store and self.kind != "rows" else (None, None)

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        if self.kind != "rows" or not self.store:
            return super().storage(shape, dtype)
        return [TensorSpec((rank,), torch.int64) for rank in self.ranks(shape) if rank is not None]

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Drawn:
        return Drawn(seed, *shape, *self.ranks(shape), torch.empty(0, device=device, dtype=dtype))

    @override
    def refresh(self, state: Drawn, grad: Gradient | None, when: When) -> Drawn:
        return state._replace(seed=derive_seed(when.seed, when.step))

    @override
    def map(self, state: Drawn) -> LinearMap:
        draw = _choose_rows if self.kind == "rows" else partial(random_basis, self.kind)
        left, right = (
            None if rank is None else draw(size, rank, seed=derive_seed(state.seed, side), template=state.like)
            for side, size, rank in (("left", state.m, state.p), ("right", state.n, state.q))
        )
        return SelectionMap(left, right, (state.m, state.n)) if self.kind == "rows" else KroneckerMap(left, right)


def _choose_rows(size: int, rank: int, *, seed: int, template: Tensor) -> Tensor:
    return some_of(size, rank, seed=seed, device=template.device)


def random_basis(kind: Distribution, size: int, rank: int, *, seed: int, template: Tensor) -> Tensor:
    """A random basis.

    Args:
        kind: As `Random.kind`, but ``rows``.
        size: Its rows.
        rank: Its columns.
        seed: The seed.
        template: Has its device and dtype.

    Returns:
        [size, rank].
    """
    drawn = gaussian(size, rank, seed=seed, device=template.device, dtype=wide(template.dtype))
    if kind == "orthonormal":
        drawn = orthonormalize(drawn, seed=seed)
    elif kind == "rademacher":
        drawn = torch.where(drawn < 0, -1.0, 1.0).to(drawn.dtype) / size**0.5
    else:
        drawn = drawn / size**0.5
    return drawn.to(template.dtype)
