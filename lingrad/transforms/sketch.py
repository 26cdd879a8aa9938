"""Sketches of a gradient: its products with random matrices that are fixed before the step.

For a Gaussian Omega [n, k], G Omega nearly spans the leading left singular vectors of G (Halko, Martinsson, Tropp 2011,
section 4.1), and E[G Omega Omega^T G^T] is G G^T up to a factor. Products are linear in G, so those of micro-batches and of
processes can be added, and they are small: k elements per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lingrad.gradients.base import Gradient
from lingrad.gradients.local import DenseGradient
from lingrad.tensors import wide
from lingrad.transforms.base import Probe, Sketch, When
from lingrad.transforms.linalg import derive_seed, start_basis


def sketched(grad: Gradient, probes: Sequence[Probe]) -> Sketch:
    """The products of a gradient with some probes, in at least float32."""
    return tuple(grad.product(left, right).to(wide(grad.dtype)) for left, right in probes)


def range_probes(bases: Sequence[Tensor | None], columns: int, when: When) -> tuple[Probe, ...]:
    """The probes of a sketch, whose products nearly span the leading singular vectors on each side that has a basis.

    Args:
        bases: The left basis [m, p] and the right one [n, q], for device and dtype; None on a side that has none.
        columns: Columns of the sketch, k.
        when: The weight's shape, the step and the run's seed: weights of equal size share a test matrix.

    Returns:
        For the left side G Omega, [m, k], then for the right one Omega^T G, [k, n]; the gradient itself where a sketch would
        not be smaller.
    """
    probes = []
    for side, basis, across in zip(("left", "right"), bases, reversed(when.shape), strict=True):
        if basis is None:
            continue
        if columns >= across:
            probes.append(Probe(None, None))
            continue
        seed = derive_seed(when.run_seed, "sketch", when.step, side)
        omega = test_matrix(across, columns, seed=seed, device=basis.device, dtype=basis.dtype)
        probes.append(Probe(None, omega) if side == "left" else Probe(omega, None))
    return tuple(probes)


def by_side(bases: Sequence[Tensor | None], sketch: Sketch) -> tuple[Gradient | None, Gradient | None]:
    """The products of `range_probes`, each turned so that its side is in the rows.

    Args:
        bases: As for `range_probes`.
        sketch: The products.

    Returns:
        G Omega [m, k] and (Omega^T G)^T [n, k]; None for a side without a basis.
    """
    products = [DenseGradient(product) for product in sketch]
    left = products.pop(0) if bases[0] is not None else None
    return left, products.pop(0).T if bases[1] is not None else None


@lru_cache(maxsize=8)
def test_matrix(rows: int, columns: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Gaussian columns of unit length in expectation, [rows, columns]; not to be written into.

    The last few are cached until `free_test_matrices`, since the weights of a step share them.

    Args:
        rows: Rows.
        columns: Columns.
        seed: The seed; the same elements on every device.
        device: The device of the result.
        dtype: The dtype of the result.

    Returns:
        The matrix.
    """
    return start_basis(rows, columns, seed=seed, device=device, dtype=dtype)


def free_test_matrices() -> None:
    """Free the test matrices of a step that is over."""
    test_matrix.cache_clear()
