"""The numerics that transforms share: seeded draws, orthonormal bases, leading singular vectors, stable signs."""

from __future__ import annotations

import hashlib
import warnings

import torch
from torch import Tensor

from lingrad.gradients.base import Gradient
from lingrad.tensors import wide


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

    Columns that depend on those before them to working precision are replaced by seeded random directions, which are made
    orthogonal last: left to rounding noise they would differ between two runs that are otherwise equal.

    Args:
        columns: [size, rank], rank <= size, at least float32.
        seed: Seed of the replacements.

    Returns:
        [size, rank], owning its memory.
    """
    factors = _Factors(columns)
    diagonal = factors.diagonal
    floor = diagonal.max() * columns.shape[0] * torch.finfo(columns.dtype).eps
    independent = ~(diagonal <= floor)  # a NaN is for the caller to see
    if bool(independent.all()):
        return factors.q()
    kept = independent.nonzero().flatten()
    missing = independent.logical_not().nonzero().flatten()
    filler = gaussian(len(columns), len(missing), seed=seed, device=columns.device, dtype=columns.dtype)
    q = _Factors(torch.cat((columns.index_select(1, kept), filler), dim=1)).q()
    return torch.empty_like(q).index_copy_(1, torch.cat((kept, missing)), q)


class _Factors:
    """Q and R of some columns, the diagonal of R made positive.

    Of float32 columns R is taken from their Gram matrix in float64 (CholeskyQR), a few large products where Householder's QR is
    many thin ones. Q is orthogonal to eps(float64) times the squared condition number, 1e-8 down to the floor above.
    """

    def __init__(self, columns: Tensor) -> None:
        self.dtype = columns.dtype
        self.by_gram = columns.dtype == torch.float32 and columns.device.type != "mps"
        if not self.by_gram:
            q, r = torch.linalg.qr(columns)
            self.diagonal = r.diagonal().abs()
            self.columns = torch.where(r.diagonal() < 0, -q, q)
            return
        self.columns = columns.double()
        gram = self.columns.t() @ self.columns
        lengths = gram.diagonal().sqrt().clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
        gram.div_(lengths).div_(lengths.unsqueeze(1))  # of columns of unit length: what depends shows whatever their scales
        shift = 0.0
        r, failed = torch.linalg.cholesky_ex(gram, upper=True)
        if bool(failed > 0):  # rounding has left the pivot of a dependent column negative, by eps for each column at most
            shift = 4 * len(gram) * torch.finfo(gram.dtype).eps
            gram.diagonal().add_(shift)
            r, failed = torch.linalg.cholesky_ex(gram, upper=True)
            r = torch.where(failed > 0, torch.nan, r)  # it is not finite
        diagonal = (r.diagonal().square() - shift).clamp_min(0).sqrt() * lengths
        self.diagonal = diagonal.to(columns.dtype)
        self.r = r * lengths

    def q(self) -> Tensor:
        """Q, owning its memory."""
        if not self.by_gram:
            return self.columns.contiguous()
        identity = torch.eye(len(self.r), device=self.r.device, dtype=self.r.dtype)
        inverse = torch.linalg.solve_triangular(self.r, identity, upper=True)
        q: Tensor = self.columns @ inverse
        return q.to(self.dtype)


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
) -> tuple[Tensor | None, Tensor | None]:
    """The leading singular vectors of a gradient, on the sides asked for.

    Args:
        grad: G [m, n].
        left: How many left singular vectors, at most min(m, n), or None.
        right: How many right singular vectors, at most min(m, n), or None.
        solver: ``exact`` (SVD of the matrix) or ``gram`` (eigenvectors of the smaller Gram matrix in float64: faster, blind
            below 1e-8 of the largest singular value).
        seed: Seed of directions the gradient does not determine.

    Returns:
        Orthonormal columns [m, left] and [n, right] in at least float32, owning their memory.
    """
    grad = grad.to(wide(grad.dtype))
    rank = max(left or 0, right or 0)
    u, s, v, resolved = (_gram if solver == "gram" else _exact)(grad.dense(), rank)
    floor = s[0] * max(grad.shape) * resolved

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


# Left vectors, singular values, right vectors, and the smallest singular value, of 1, that is told from rounding.
Factors = tuple[Tensor, Tensor, Tensor, float]


def _exact(matrix: Tensor, rank: int) -> Factors:
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        warnings.warn(f"the SVD did not converge ({error}); the Gram matrix is used instead", RuntimeWarning, stacklevel=2)
        return _gram(matrix, rank)
    return u, s, vh.t(), torch.finfo(s.dtype).eps


def _gram(matrix: Tensor, rank: int) -> Factors:
    """By the eigenvectors of the smaller Gram matrix, which squares the condition number: in float64, where there is one."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u, resolved = _gram(matrix.t(), rank)
        return u, s, v, resolved
    exact = matrix if matrix.device.type == "mps" else matrix.double()
    values, vectors = torch.linalg.eigh(exact @ exact.t())  # ascending
    s = values[-rank:].flip(0).clamp_min(0).sqrt()
    u = vectors[:, -rank:].flip(1)
    v = exact.t() @ u / s.clamp_min(torch.finfo(s.dtype).tiny)
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype), torch.finfo(s.dtype).eps ** 0.5
