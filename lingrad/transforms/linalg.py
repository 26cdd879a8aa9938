"""The numerics that transforms share: seeded random matrices, orthonormal bases, leading singular vectors, stable signs."""

from __future__ import annotations

import hashlib
import warnings
from typing import Literal, overload

import torch
from torch import Tensor

from lingrad.gradients.base import Gradient
from lingrad.tensors import whole, wide


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
    """Standard normal elements, [rows, columns]; drawn on the CPU, so that a seed gives the same on every device."""
    if device.type == "meta":  # it has no data, and random bases of a large model would take minutes
        return torch.empty(rows, columns, dtype=torch.float32, device=device).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(device=device, dtype=dtype)


def start_basis(size: int, rank: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random basis [size, rank] with columns of unit length in expectation, as a transform has at its start."""
    return gaussian(size, rank, seed=seed, device=device, dtype=wide(dtype)).div_(size**0.5).to(dtype)


def some_of(size: int, count: int, *, seed: int, device: torch.device) -> Tensor:
    """Random indices, int64 [count], ascending and without repeats; drawn on the CPU, the same on every device."""
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
    return chosen.sort().values.to(device)


def choose_by_size(sizes: Tensor, count: int, *, floor: Tensor, power: float | None = None, seed: int = 0) -> Tensor:
    """The indices of some sizes: the largest, or a sample without replacement.

    A sample is drawn one after the other, each with a probability proportional to a power of the size, among those that are
    left: those with the ``count`` largest quotients of that power and an exponential random number (Efraimidis, Spirakis 2006).

    Of the largest, sizes that differ by less than 2e-4 of themselves (1e-8 in float64) count as equal, and the first is taken:
    rounding would decide otherwise, and differently in two runs that are equal.

    Args:
        sizes: [k], not negative.
        count: How many, at most k.
        floor: 0-d. Sizes up to it are rounding errors and count as 0; such are taken last, those of low index first.
        power: Of the size that probabilities are proportional to; None takes the largest.
        seed: Seed of the sample.

    Returns:
        int64 [count], ascending.
    """
    sizes = torch.where(sizes <= floor, 0, sizes)
    if power is None:
        steps = 2.0**12 if sizes.dtype == torch.float32 else 2.0**26
        sizes = sizes.log2().mul_(steps).round_()
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(len(sizes), dtype=torch.float32, device="cpu").exponential_(generator=generator)
        sizes = sizes**power / drawn.to(device=sizes.device, dtype=sizes.dtype)
    return sizes.sort(descending=True, stable=True).indices[:count].sort().values


def orthonormalize(columns: Tensor, *, seed: int) -> Tensor:
    """Orthonormal columns with the same span, by a QR whose R has a positive diagonal.

    Columns that depend linearly on those before them, to working precision, are replaced by seeded random directions, made
    orthogonal to all others. Left to rounding errors they would differ between two runs that are otherwise equal.

    Args:
        columns: [size, rank], rank <= size, float32 or float64.
        seed: Seed of the replacements.

    Returns:
        [size, rank], owning its memory.
    """
    qr = _QR(columns)
    diagonal = qr.diagonal
    floor = diagonal.max() * columns.shape[0] * torch.finfo(columns.dtype).eps
    independent = ~(diagonal <= floor)  # NaN stays for the caller to find
    if bool(independent.all()):
        return qr.q()
    present = independent.nonzero().flatten()
    missing = independent.logical_not().nonzero().flatten()
    filler = gaussian(len(columns), len(missing), seed=seed, device=columns.device, dtype=columns.dtype)
    q = _QR(torch.cat((columns.index_select(1, present), filler), dim=1)).q()
    return torch.empty_like(q).index_copy_(1, torch.cat((present, missing)), q)


class _QR:
    """A QR factorization whose R has a positive diagonal.

    For float32 columns R comes from their Gram matrix in float64 (CholeskyQR): a few large products instead of the many thin
    ones of Householder's QR. Q is orthogonal to eps(float64) times the squared condition number, 1e-8 down to the floor of
    `orthonormalize`.
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
        gram.div_(lengths).div_(lengths.unsqueeze(1))  # scaled to unit columns, so that scales do not hide dependence
        shift = 0.0
        r, failed = torch.linalg.cholesky_ex(gram, upper=True)
        if bool(failed > 0):  # rounding made the pivot of a dependent column negative, by at most eps for each column
            shift = 4 * len(gram) * torch.finfo(gram.dtype).eps
            gram.diagonal().add_(shift)
            r, failed = torch.linalg.cholesky_ex(gram, upper=True)
            r = torch.where(failed > 0, torch.nan, r)  # the columns are not finite
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


@overload
def align_signs(new: Tensor, old: Tensor | None) -> Tensor: ...
@overload
def align_signs(new: Tensor | None, old: Tensor | None) -> Tensor | None: ...
def align_signs(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """Flip columns that point against the same column of the old basis.

    A basis is defined only up to the signs of its columns; moments that a refresh carries over depend on them.

    Args:
        new: [size, rank], or None for a side without a basis.
        old: [size, rank], or None.

    Returns:
        ``new`` with some columns negated.
    """
    if new is None or old is None:
        return new
    against = (new * old.to(new.dtype)).sum(0) < 0
    return torch.where(against, -new, new)


def fix_signs(vectors: Tensor | None, seed: int) -> Tensor | None:
    """Flip columns that point against a fixed random vector: one that returns has its sign again, wherever it stands.

    For bases in which a column may be orthogonal to the old one in its place, where rounding would decide for `align_signs`.

    Args:
        vectors: [size, rank], or None for a side without a basis.
        seed: Seed of the fixed vector, the same at each refresh.

    Returns:
        ``vectors`` with some columns negated.
    """
    if vectors is None:
        return None
    fixed = gaussian(len(vectors), 1, seed=derive_seed(seed, "signs"), device=vectors.device, dtype=vectors.dtype)
    return align_signs(vectors, fixed)


def leading_vectors(
    grad: Gradient,
    left: int | None,
    right: int | None,
    *,
    solver: Literal["exact", "gram"] = "exact",
    sample: float | None = None,
    energy: float | None = None,
    seed: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The leading singular vectors of a gradient, on one side or on both; or a sample of them.

    Args:
        grad: G [m, n].
        left: How many left singular vectors, at most min(m, n), or None.
        right: How many right singular vectors, at most min(m, n), or None.
        solver: ``exact`` (SVD of the matrix) or ``gram`` (eigenvectors of the smaller Gram matrix in float64: faster, but
            singular values below 1e-8 of the largest are not resolved).
        sample: None for the leading ones. A number draws them without replacement, with a probability proportional to that
            power of the singular value; the same ones on both sides, in the order of their singular values.
        energy: Of the leading ones: keep the fewest whose squared singular values add up to at least this share of |G|_F^2,
            those alone that the gradient determines. The columns after them are zero. No number is read from the device.
        seed: Seed of the sample, and of directions that the gradient does not determine.

    Returns:
        Orthonormal columns [m, left] and [n, right] in at least float32, owning their memory; zero ones where ``energy`` says.
    """
    grad = grad.to(wide(grad.dtype))
    rank = max(left or 0, right or 0)
    u, s, v, resolved = (_gram if solver == "gram" else _exact)(grad.dense(), rank if sample is None else min(grad.shape))
    floor = s[0] * max(grad.shape) * resolved
    if sample is not None:
        chosen = choose_by_size(s, rank, floor=floor, power=sample, seed=derive_seed(seed, "sample"))
        u, s, v = u.index_select(1, chosen), s.index_select(0, chosen), v.index_select(1, chosen)
    enough = None if energy is None else _before(s, rank, energy)

    def completed(vectors: Tensor, count: int | None, side: str) -> Tensor | None:
        """The vectors that the gradient determines, and seeded ones in place of the others."""
        if count is None:
            return None
        vectors, clear = vectors[:, :count], ~(s[:count] <= floor)
        if enough is not None:
            return torch.where(clear & enough[:count], vectors, 0)
        if bool(clear.all()):
            return vectors.clone(memory_format=torch.contiguous_format)  # a slice would keep the whole factor in memory
        fill = derive_seed(seed, side)
        filler = gaussian(*vectors.shape, seed=fill, device=vectors.device, dtype=vectors.dtype)
        return orthonormalize(torch.where(clear, vectors, filler), seed=fill)

    return completed(u, left, "left"), completed(v, right, "right")


def squared_singular_values(matrix: Tensor, blocks: int = 1) -> Tensor:
    """All squared singular values of a matrix, each exact to 1e-16 of their sum where the device has float64.

    Args:
        matrix: [m, n], in any floating dtype, and perhaps sharded.
        blocks: Of how many blocks of rows; the squares of all, the largest of each block first, are added up.

    Returns:
        [min(m / blocks, n)], the largest first; NaN where the matrix is not finite, or too large.
    """
    matrix = whole(matrix)
    matrix = matrix.to(wide(matrix.dtype)) if matrix.device.type == "mps" else matrix.double()
    if matrix.shape[0] > matrix.shape[1] * blocks:
        grams = torch.stack([part.t() @ part for part in matrix.chunk(blocks)])
    else:
        grams = torch.stack([part @ part.t() for part in matrix.chunk(blocks)])
    values = torch.linalg.eigvalsh(torch.where(grams.isfinite().all(), grams, 0)).flip(-1).clamp_min_(0).sum(0)
    return torch.where(grams.isfinite().all(), values, torch.nan)


def _before(s: Tensor, count: int, energy: float) -> Tensor:
    """Of the first ``count`` singular values, whether those before each capture less than a share of all squares; bool."""
    squares = (s / s[0].clamp_min(torch.finfo(s.dtype).tiny)).square()
    # what the vectors before each one leave; a difference of two sums would let rounding decide about a share of 1
    rest = squares.expand(count, -1).triu().sum(1)
    return ~(rest <= (1.0 - energy) * rest[0])


# Left vectors, all singular values, right vectors (at least as many as were asked for), and the relative size below which a
# singular value is rounding error.
_Vectors = tuple[Tensor, Tensor, Tensor, float]


def _exact(matrix: Tensor, rank: int) -> _Vectors:
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        warnings.warn(f"the SVD did not converge ({error}); the Gram matrix is used instead", RuntimeWarning, stacklevel=2)
        return _gram(matrix, rank)
    return u, s, vh.t(), torch.finfo(s.dtype).eps


def _gram(matrix: Tensor, rank: int) -> _Vectors:
    """By the eigenvectors of the smaller Gram matrix, in float64 if the device has it: they square the condition number."""
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u, resolved = _gram(matrix.t(), rank)
        return u, s, v, resolved
    exact = matrix if matrix.device.type == "mps" else matrix.double()
    values, vectors = torch.linalg.eigh(exact @ exact.t())  # ascending
    s = values.flip(0).clamp_min(0).sqrt()
    u = vectors[:, -rank:].flip(1)
    v = exact.t() @ u / s[:rank].clamp_min(torch.finfo(s.dtype).tiny)
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype), torch.finfo(s.dtype).eps ** 0.5
