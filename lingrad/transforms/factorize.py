"""The numerics that transforms share: seeded draws, orthonormal bases, leading singular vectors, stable signs."""

from __future__ import annotations

import hashlib
import warnings

import torch
from torch import Tensor

from lingrad.gradient import Gradient, wide


def derive_seed(seed: int, *parts: object) -> int:
    """Hash a seed with names and counters into another seed.

    Args:
        seed: The run's seed.
        *parts: Anything with a stable ``str``, such as a parameter's name and a step.

    Returns:
        A 63-bit integer, the same on every machine and in every process.
    """
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def gaussian(rows: int, columns: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, [rows, columns]; drawn on the CPU, so that a seed means the same on every device."""
    if device.type == "meta":  # nothing to draw, and a large model's bases would take minutes
        return torch.empty(rows, columns, dtype=torch.float32, device=device).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(device=device, dtype=dtype)


def start_basis(size: int, rank: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random basis [size, rank] with columns of unit length in expectation: where a transform starts from."""
    return gaussian(size, rank, seed=seed, device=device, dtype=wide(dtype)).div_(size**0.5).to(dtype)


def orthonormalize(columns: Tensor, *, seed: int) -> Tensor:
    """Orthonormal columns with the same span, by a QR whose R has a positive diagonal.

    Columns that depend on the others to working precision are replaced by seeded random directions before the QR: left
    to rounding noise they would differ between two runs that are otherwise equal.

    Args:
        columns: [size, rank], rank <= size, at least float32.
        seed: Seed of the replacements.

    Returns:
        [size, rank], owning its memory.
    """
    q, r = torch.linalg.qr(columns)
    diagonal = r.diagonal()
    floor = diagonal.abs().max() * columns.shape[0] * torch.finfo(columns.dtype).eps
    independent = ~(diagonal.abs() <= floor)  # a NaN is for the caller to see
    if not bool(independent.all()):
        filler = gaussian(*columns.shape, seed=seed, device=columns.device, dtype=columns.dtype)
        q, r = torch.linalg.qr(torch.where(independent, q, filler))
        diagonal = r.diagonal()
    return torch.where(diagonal < 0, -q, q).contiguous()


def align_signs(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Flip columns that point against the same column of the old basis.

    A basis is only defined up to the sign of its columns; moments kept over a refresh are not.

    Args:
        new: [size, rank], or None where a side has no basis.
        old: [size, rank], or None.

    Returns:
        ``new`` with some columns negated.
    """
    if new is None or old is None:
        return new
    against = (new * old.to(new.dtype)).sum(0) < 0
    return torch.where(against, -new, new)


def leading_vectors(
    grad: Gradient,
    left: int | None,
    right: int | None,
    *,
    solver: str,
    seed: int,
    oversample: int = 8,
    iters: int = 2,
) -> tuple[Tensor | None, Tensor | None]:
    """The leading singular vectors of a gradient, on the sides asked for.

    Args:
        grad: G [m, n].
        left: How many left singular vectors, at most min(m, n), or None.
        right: How many right singular vectors, at most min(m, n), or None.
        solver: ``exact`` (SVD of the matrix), ``gram`` (eigenvectors of the smaller Gram matrix: faster, blind below
            sqrt(eps) of the largest singular value) or ``randomized`` (Halko, Martinsson, Tropp 2011, algorithms 4.4
            and 5.1: products only).
        seed: Seed of the sketch and of directions the gradient does not determine.
        oversample: Extra sketch columns of ``randomized``.
        iters: Power iterations of ``randomized``.

    Returns:
        Orthonormal columns [m, left] and [n, right] in at least float32, owning their memory.
    """
    grad = grad.to(wide(grad.dtype))
    rank = max(left or 0, right or 0)
    if solver == "exact":
        u, s, v, digits = _exact(grad.dense(), rank)
    elif solver == "gram":
        u, s, v, digits = _gram(grad.dense(), rank)
    else:
        u, s, v, digits = _randomized(grad, rank, seed, oversample, iters)
    floor = s[0] * max(grad.shape) * torch.finfo(s.dtype).eps ** digits

    def settled(vectors: Tensor, count: int | None, side: str) -> Tensor | None:
        """Vectors that the gradient determines, completed by seeded ones where it does not."""
        if count is None:
            return None
        vectors, clear = vectors[:, :count], ~(s[:count] <= floor)
        if bool(clear.all()):
            return vectors.clone(memory_format=torch.contiguous_format)  # a slice would keep the whole factor alive
        fill = derive_seed(seed, side)
        filler = gaussian(*vectors.shape, seed=fill, device=vectors.device, dtype=vectors.dtype)
        return orthonormalize(torch.where(clear, vectors, filler), seed=fill)

    return settled(u, left, "left"), settled(v, right, "right")


# Left vectors, singular values, right vectors, and the share of the dtype's digits that the small ones of them have.
Factors = tuple[Tensor, Tensor, Tensor, float]


def _exact(matrix: Tensor, rank: int) -> Factors:
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        warnings.warn(f"the SVD did not converge ({error}); the Gram matrix is used instead", RuntimeWarning, stacklevel=2)
        return _gram(matrix, rank)
    return u, s, vh.t(), 1.0


def _gram(matrix: Tensor, rank: int) -> Factors:
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u, digits = _gram(matrix.t(), rank)
        return u, s, v, digits
    values, vectors = torch.linalg.eigh(matrix @ matrix.t())  # ascending
    s = values[-rank:].flip(0).clamp_min(0).sqrt()
    u = vectors[:, -rank:].flip(1)
    return u, s, matrix.t() @ u / s.clamp_min(torch.finfo(s.dtype).tiny), 0.5


def _randomized(grad: Gradient, rank: int, seed: int, oversample: int, iters: int) -> Factors:
    m, n = grad.shape
    width = min(rank + oversample, m, n)
    sketch = gaussian(n, width, seed=seed, device=grad.device, dtype=grad.dtype)
    q = orthonormalize(grad.matmul(sketch), seed=seed)
    for _ in range(iters):
        right = orthonormalize(grad.rmatmul(q).t(), seed=seed)
        q = orthonormalize(grad.matmul(right), seed=seed)
    u, s, v, digits = _exact(grad.rmatmul(q), rank)
    return q @ u, s, v, digits
