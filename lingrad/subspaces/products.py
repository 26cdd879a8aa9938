"""The products of a weight's gradient that a refresh from a sketch reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lingrad.gradients import Gradient
from lingrad.gradients.local import RowsGradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.tensors import wide
from lingrad.transforms import Probe, Sketch
from lingrad.weights.base import Weight
from lingrad.weights.sharding import LayerSharding


def sketch(asked: Sequence[Probe], current: LinearMap, weight: Weight, grad: Gradient, projected: Tensor) -> Sketch:
    """The products of a weight's gradient that a refresh asks for.

    Args:
        asked: What it is multiplied with, as `Subspace.probes` gives it.
        current: The map in use.
        weight: The weight.
        grad: G [m, n].
        projected: Its projection by that map, [p, q], which may be one of them.

    Returns:
        A product for each probe.
    """
    seen = in_whole(grad, weight)
    known = [seen is grad and is_projection(current, probe) for probe in asked]
    return products(seen, asked, known, projected)


def in_whole(grad: Gradient, weight: Weight) -> Gradient:
    """The gradient of a process's part of a weight in that of the whole weight, zero elsewhere.

    Args:
        grad: The gradient; that of the whole weight unless tensor parallelism has cut it.
        weight: The weight.

    Returns:
        [m, n] of the whole weight.
    """
    if not isinstance(weight.sharding, LayerSharding):
        return grad
    dim = weight.sharding.dim
    size = weight.layout.shape[dim]
    first = weight.sharding.rows(size).start
    return RowsGradient(grad, first, size) if dim == 0 else RowsGradient(grad.T, first, size).T


def is_projection(current: LinearMap, probe: Probe) -> bool:
    """Whether the product of a probe is the projection by a map, which is not computed twice."""
    return isinstance(current, KroneckerMap) and current.left is probe.left and current.right is probe.right


def products(grad: Gradient, probes: Sequence[Probe], known: Sequence[bool], projected: Tensor) -> Sketch:
    """The products of a gradient with some probes.

    Args:
        grad: G [m, n].
        probes: What it is multiplied with.
        known: For each of them whether it `is_projection`.
        projected: The projection, [p, q].

    Returns:
        The products, in memory of their own and at least float32.
    """
    found = []
    for (left, right), same in zip(probes, known, strict=True):
        found.append((projected if same else grad.product(left, right)).to(wide(grad.dtype), copy=same))
    return tuple(found)
