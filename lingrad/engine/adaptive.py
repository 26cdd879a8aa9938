"""Bases whose ``schedule`` decides when they are refreshed: the figures that it decides by, and what each step adds to them.

All processes decide by the figures of the first, and both modes by what both have alike. A number is read from the device at
checks and refreshes only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lingrad.engine.run import Run
from lingrad.gradients import Gradient
from lingrad.maps import LinearMap
from lingrad.parallel import Processes
from lingrad.subspaces.basis import Basis
from lingrad.subspaces.schedule import Cadence, NextRefresh
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import cast, is_sharded, own, whole, wide
from lingrad.transforms import Probe
from lingrad.transforms.schedules import EnergySchedule, PathSchedule
from lingrad.transforms.sketch import sketched


def keeps(run: Run, basis: Basis, grad: Gradient) -> bool:
    """Whether the basis in use captures enough of a gradient to stay, at a check.

    Args:
        run: The run.
        basis: The basis, due.
        grad: G of the stacked weights, not zero; of several processes their mean.

    Returns:
        False where its refreshes are not decided by that.
    """
    if not _by_energy(basis):
        return False
    current = basis.map()
    if run.processes.count == 1:
        return _enough(run, basis, current.norm(cast(current.project(grad), wide(grad.dtype))) / grad.norm())
    held_out = basis.held_out(run.of(basis)[0].sub.coords)
    return keeps_by(run, basis, sketched(grad, held_out), held_out)


def keeps_by(run: Run, basis: Basis, products: Sequence[Tensor], held_out: Sequence[Probe]) -> bool:
    """`keeps`, from products of the gradient with test vectors.

    Args:
        run: The run.
        basis: The basis, due.
        products: The products of the probes.
        held_out: The test vectors, as `Basis.held_out` gives them.

    Returns:
        True also where the basis spans the whole space.
    """
    if not _by_energy(basis):
        return False
    energy = captured(basis.map(), products, held_out)
    return energy is None or _enough(run, basis, energy)


def refreshed(run: Run, basis: Basis, old: LinearMap, new: LinearMap) -> None:
    """Tell a basis's schedule that it is about to change.

    Args:
        run: The run.
        basis: The basis, not changed yet.
        old: The map in use.
        new: The map to come.
    """
    if basis.cadence is None:
        return
    overlap = None
    if basis.cadence.rule.decides == "bases" and basis.refreshes > 0:
        ranks, like = basis.transform.ranks(basis.shape), run.of(basis)[0].sub.coords.detach()
        (overlap,) = _agreed(run.processes, overlap_of(old, new, ranks, own(like)).reshape(1))
    basis.cadence.refreshed(basis.when.step, overlap)


def decide(run: Run) -> None:
    """Decide before the next step which bases it refreshes, of those that decide by what steps have added up.

    Args:
        run: The run, between two steps.
    """
    bases = [basis for basis in run.bases if basis.checks(run.step)]
    if not bases:
        return
    figures = torch.stack([_length(run, basis).to(run.subspaces[0].coords.device) for basis in bases])
    for basis, figure in zip(bases, _agreed(run.processes, figures), strict=True):
        cadence = _cadence(basis)
        if not figure >= _path(cadence).threshold:  # what is not finite begins anew too
            cadence.wanted = run.step - basis.offset


def next_refresh(run: Run, basis: Basis) -> NextRefresh | None:
    """When a basis is refreshed next.

    Args:
        run: The run, between two steps.
        basis: The basis.

    Returns:
        The step; None where there is no further refresh.
    """
    cadence, now = basis.cadence, run.step
    every = basis.transform.period if cadence is None else cadence.interval
    first = basis.refreshes == 0
    later = range(now + 1, max(now, basis.offset) + every + 1)
    step = now if basis.due else next((step for step in later if basis.acts_in(step)), None)
    if step is None:
        return None
    decides = "bases" if cadence is None else cadence.rule.decides
    return NextRefresh(step, every, first or decides == "bases" or (decides == "steps" and basis.due))


def follow(subs: Sequence[Subspace]) -> None:
    """Add a step's gradients to what some schedules decide by; on the device.

    Args:
        subs: The subspaces that were stepped, each with its gradient still.
    """
    subs = [sub for sub in subs if sub.basis.cadence is not None and sub.basis.cadence.rule.decides == "steps"]
    grads = [sub.coords.grad for sub in subs if sub.coords.grad is not None]
    for sub, grad in zip(subs, grads, strict=True):
        cadence = _cadence(sub.basis)
        total, numbers = cadence.path(sub.name, sub.coords)
        size, mine = _norm(grad, own(grad)), own(total)
        divisor = size.clamp_min(torch.finfo(size.dtype).tiny)
        if _path(cadence).measure == "efficiency":
            mine.addcdiv_(own(grad), divisor)
        else:
            unit = own(grad) / divisor
            mine.copy_(torch.where(numbers[0] > 0, mine, unit))
            numbers[1].copy_(torch.where(size > 0, _norm(total, unit.sub_(mine)), numbers[1]))
        numbers[0].add_(size.sign())


def captured(chosen: LinearMap, products: Sequence[Tensor], probes: Sequence[Probe]) -> Tensor | None:
    """|S S^T G| / |G|, estimated from hold-out test vectors.

    For a left map |P P^T G w| / |G w| is measured for test vectors w, whose mean square is that of G itself. Of a two-sided one
    it is known for each side, and the figure is the least that both can have together, (a^2 + b^2 - 1)^(1/2).

    Args:
        chosen: The map S.
        products: The products of the probes.
        probes: The test vectors, as `Basis.held_out` gives them.

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


def overlap_of(old: LinearMap, new: LinearMap, ranks: tuple[int | None, int | None], like: Tensor) -> Tensor:
    """|S_old^T S_new|_F^2 / r; of two-sided maps the product of that of both sides. Zero columns do not count in r.

    Args:
        old: The map in use.
        new: The map to come.
        ranks: The ranks of both sides, as `Transform.ranks` gives them.
        like: Coordinates, for device and dtype.

    Returns:
        0-d; 1 where both maps are orthonormal and span the same space.
    """
    found = like.new_ones(())
    for rank, one, other in zip(ranks, (old.inner, old.T.inner), (new.inner, new.T.inner), strict=True):
        if rank is not None:
            eye = torch.eye(rank, dtype=like.dtype, device=like.device)
            columns, later = one.lift(eye), other.lift(eye)
            used = torch.maximum(columns.any(0).sum(), later.any(0).sum()).clamp_min(1)
            found = found * other.project(columns).square().sum() / used
    return found


def _enough(run: Run, basis: Basis, energy: Tensor) -> bool:
    rule = _cadence(basis).rule
    assert isinstance(rule, EnergySchedule)  # noqa: S101 - no other decides by the gradient
    enough = (energy >= rule.threshold(basis.energy)).to(energy.dtype)  # each process has a reference of its own
    return _agreed(run.processes, enough.reshape(1))[0] > 0


def _length(run: Run, basis: Basis) -> Tensor:
    """How far the steps in a basis have led, over their number, 0-d; infinite where there was none."""
    cadence, squares = _cadence(basis), []
    for attachment in run.of(basis):
        total, numbers = cadence.path(attachment.sub.name, attachment.sub.coords)
        length = _norm(total, own(total)) if _path(cadence).measure == "efficiency" else numbers[1]
        squares.append(torch.where(numbers[0] == 0, torch.inf, length / numbers[0]).square())
    found = torch.stack(squares)
    known = found != torch.inf
    mean = torch.where(known, found, 0).sum() / known.sum()
    return torch.where(known.any(), mean, torch.inf).sqrt()


def _by_energy(basis: Basis) -> bool:
    return basis.cadence is not None and basis.cadence.rule.decides == "gradient" and basis.refreshes > 0


def _cadence(basis: Basis) -> Cadence:
    assert basis.cadence is not None  # noqa: S101 - the caller has looked
    return basis.cadence


def _path(cadence: Cadence) -> PathSchedule:
    assert isinstance(cadence.rule, PathSchedule)  # noqa: S101 - no other decides by what steps have added up
    return cadence.rule


def _norm(like: Tensor, part: Tensor) -> Tensor:
    """The norm of a tensor that is spread as another is, from this process's part of it; 0-d."""
    if is_sharded(like):
        spread = torch.empty_like(like)
        own(spread).copy_(part)
        return whole(torch.linalg.vector_norm(spread))
    norm: Tensor = torch.linalg.vector_norm(part)
    return norm


def _agreed(processes: Processes, figures: Tensor) -> list[float]:
    """Figures [k] as all processes have them, those of the first."""
    processes.broadcast([figures])
    return [float(figure) for figure in figures.cpu()]
