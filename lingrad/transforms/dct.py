"""`dct`: columns of a cosine transform that fit the gradient best (DCT-AdamW: Modoranu et al., 2025, arXiv 2505.17967)."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.gradients.base import ROWS, Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.transforms.indices import IndexTransform, Indices
from lingrad.transforms.registry import register


@register("dct")
@final
class DCT(IndexTransform):
    """Columns of an orthonormal cosine matrix D, those with the largest norms of D_jᵀ G (on the right side of G D_j).

    Column j has the entries c_j cos(pi (2 i + 1) j / (2 size)) with c_0 = (1 / size)^(1/2), else (2 / size)^(1/2):
    the vectors of the DCT-II. They are computed from their indices, which are all that a checkpoint has.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        store: Store the columns between refreshes; false computes them again at each use, which takes time instead of memory.

    Raises:
        SpecError: An option is out of range.
    """

    store: bool = True

    @property
    @override
    def stores_map(self) -> bool:
        return self.store

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        found = super().basis_shapes(shape)
        return found if self.store else (None, None)

    @override
    def sizes(self, seen: Gradient) -> Tensor:
        size = seen.shape[0]
        products = [  # some columns at a time: neither all of D nor the gradient is formed
            seen.rmatmul(cosines(size, torch.arange(start, min(start + ROWS, size), device=seen.device), seen.dtype))
            for start in range(0, size, ROWS)
        ]
        return torch.cat([torch.linalg.vector_norm(product, dim=1) for product in products])

    @override
    def map(self, state: Indices) -> LinearMap:
        left, right = (
            None if chosen is None else cosines(size, chosen, state.like.dtype)
            for size, chosen in ((state.m, state.left), (state.n, state.right))
        )
        return KroneckerMap(left, right)


def cosines(size: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Some columns of the orthonormal matrix of the DCT-II's vectors.

    Args:
        size: Rows, and columns of the whole matrix.
        columns: int64 indices [r].
        dtype: Of the result; it is computed in float64, where the device has it.

    Returns:
        [size, r], c_j cos(pi (2 i + 1) j / (2 size)) in row i.
    """
    exact = torch.float32 if columns.device.type == "mps" else torch.float64
    odd = torch.arange(1, 2 * size, 2, device=columns.device)
    # whole multiples of 2 pi are taken off in integers, where they are exact
    angles = (odd.unsqueeze(1) * columns).remainder_(4 * size).to(exact).mul_(math.pi / (2 * size))
    heights = (columns > 0).to(exact).add_(1).div_(size).sqrt_()
    return angles.cos_().mul_(heights).to(dtype)
