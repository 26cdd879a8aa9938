"""What a backward leaves behind: the projected gradient, and in a refresh step what the new basis is chosen from.

A transform that reads the gradient gets it whole. One that reads a sketch gets products with matrices that were fixed before
the step; they are made where the gradient's factors are at hand, and added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lingrad.gradients.base import Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.parallel import average
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import wide
from lingrad.transforms.base import Probe, Sketch
from lingrad.transforms.linalg import derive_seed
from lingrad.transforms.sketch import test_matrix

WITNESSES = 16  # columns that no transform fits its basis to, by which its energy is told


def capture(sub: Subspace, grad: Gradient) -> None:
    """``coords.grad += project(grad)``: linear, so that micro-batches, and ranks, add up in the small space.

    Args:
        sub: The subspace.
        grad: G [m, n] of one micro-batch; kept until the step where a refresh reads it.
    """
    sub._before_accumulate()
    projected = sub.map().project(grad)
    if sub.due:
        note(sub, grad, projected)
    projected = average(projected.to(sub.coords.dtype))
    if sub.coords.grad is None:
        sub.coords.grad = projected
    else:
        sub.coords.grad.add_(projected)
    sub._after_accumulate()


def note(sub: Subspace, grad: Gradient, projected: Tensor, owned: Callable[[], Gradient] | None = None) -> None:
    """Keep what a refresh needs of one backward.

    Args:
        sub: The subspace, ``due``.
        grad: G [m, n].
        projected: Its projection by the current map, [p, q], which may be one of the products.
        owned: Makes the gradient anew in memory that nobody else will write into, where it is in other memory now.
    """
    if sub.transform.reads == "gradient":
        sub.captured.stage(grad if owned is None else owned())
        return
    asked = questions(sub)
    start, rows = _rows(sub), grad.shape[0]
    own = [
        probe if probe.left is None or len(probe.left) == rows else probe._replace(left=probe.left[start : start + rows])
        for probe in (*asked.probes, *asked.witnesses)
    ]
    sub.captured.stage(products(grad, own, sub.map(), projected))


def products(grad: Gradient, probes: Sequence[Probe], current: LinearMap, projected: Tensor) -> Sketch:
    """The products of a gradient with some probes; one that is its projection is not made again.

    Args:
        grad: G [m, n].
        probes: What it is multiplied with.
        current: The map of its projection.
        projected: Its projection, [p, q].

    Returns:
        The products, in memory of their own and at least float32.
    """
    found = []
    for left, right in probes:
        known = isinstance(current, KroneckerMap) and current.left is left and current.right is right
        found.append((projected if known else grad.product(left, right)).to(wide(grad.dtype), copy=known))
    return tuple(found)


class Questions(NamedTuple):
    """What a refresh asks of the gradient.

    Args:
        probes: The transform's own, from which it learns.
        witnesses: Of one or both sides: test columns by which the new basis is judged.
    """

    probes: tuple[Probe, ...]
    witnesses: tuple[Probe, ...]


def questions(sub: Subspace) -> Questions:
    """What the refresh of the step being prepared asks; the same for all who share a basis, in their stacked shape."""
    lead = sub.leader or sub
    return Questions(lead.transform.probes(lead.state, lead.when), witnesses(lead))


def witnesses(sub: Subspace) -> tuple[Probe, ...]:
    """Test columns for each side on which coordinates are fewer than the weight's rows or columns."""
    shape, when = sub.when.shape, sub.when
    small = sub.transform.coords_shape(shape)
    found = []
    for side, few, size, across in zip(("left", "right"), small, shape, reversed(shape), strict=True):
        if few < size:
            seed = derive_seed(when.run_seed, "witness", when.step, side)
            columns = min(WITNESSES, across)
            drawn = test_matrix(across, columns, seed=seed, device=sub.coords.device, dtype=sub.coords.dtype)
            found.append(Probe(None, drawn) if side == "left" else Probe(drawn, None))
    return tuple(found)


def gathered(members: Sequence[Subspace], probes: Sequence[Probe]) -> Sketch | None:
    """The products of the stacked gradient, from what each member found; the mean over ranks.

    Args:
        members: The subspaces that share a basis; one, as a rule.
        probes: What was asked.

    Returns:
        The products; None where no member has found anything.
    """
    found = [sub.captured.total if isinstance(sub.captured.total, tuple) else None for sub in members]
    known = next((total for total in found if total is not None), None)
    if known is None:
        return None
    products = []
    for i, (left, _) in enumerate(probes):
        if left is not None:
            products.append(average(_sum([total[i] for total in found if total is not None])))
            continue
        rows = [
            known[i].new_zeros(sub.layout.shape[0], known[i].shape[1]) if total is None else total[i]
            for sub, total in zip(members, found, strict=True)
        ]
        products.append(average(rows[0] if len(rows) == 1 else torch.cat(rows)))
    return tuple(products)


def energy(chosen: LinearMap, products: Sequence[Tensor], probes: Sequence[Probe]) -> Tensor | None:
    """|S S^T G| / |G|, as witnesses tell it.

    A left map shows |P P^T G w| / |G w| for test columns w, whose mean square is that of G itself. Of a two-sided one this is
    known side by side, and the figure is the least that both can have together, (a^2 + b^2 - 1)^(1/2).

    Args:
        chosen: The map S.
        products: Those of `witnesses`.
        probes: The witnesses.

    Returns:
        A 0-d tensor; None where the map has no side that is smaller than the weight's.
    """
    squares: list[Tensor] = []
    for product, (left, _) in zip(products, probes, strict=True):
        side = chosen.inner if left is None else chosen.T.inner.T
        norm = torch.linalg.vector_norm(product).clamp_min(torch.finfo(product.dtype).tiny)
        squares.append((side.norm(side.project(product)) / norm).square())
    if not squares:
        return None
    return squares[0].sqrt() if len(squares) == 1 else (squares[0] + squares[1] - 1).clamp_min(0).sqrt()


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum(0)


def _rows(sub: Subspace) -> int:
    """Where the weight's rows begin in the stacked shape."""
    members = (sub.leader or sub).members
    return sum(other.layout.shape[0] for other in members[: members.index(sub)])
