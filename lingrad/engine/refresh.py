"""How bases change: chosen from the gradient within the step, from a sketch after it, or drawn before the next.

A refresh is proposed to a basis, and committed for all weights that use it: coordinates are merged through the old map, the
base optimizer's moments carried over, the ledgers of the old basis closed, and then the basis is replaced, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lingrad.engine import adaptive
from lingrad.engine.adaptive import captured
from lingrad.engine.reading import gathered, nothing, stacked, weights
from lingrad.engine.run import Run
from lingrad.gradients import Gradient
from lingrad.gradients.averaged import averaged
from lingrad.maps import LinearMap
from lingrad.subspaces import trees
from lingrad.subspaces.basis import Basis
from lingrad.subspaces.products import in_whole
from lingrad.subspaces.schedule import Probes
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import cast, whole
from lingrad.transforms import Sketch
from lingrad.transforms.sketch import free_test_matrices, sketched

NOT_FINITE = "the gradient's norm at a refresh is not finite; the old basis stays until the next one"


def choose(run: Run, subs: Iterable[Subspace]) -> None:
    """Propose new bases from the gradients of this step's backwards; each ``coords.grad`` becomes its projection.

    Args:
        run: The run.
        subs: Subspaces that are due, of transforms that read the gradient; what has no gradient is left alone.
    """
    due = [sub for sub in subs if sub.basis.proposal is None and sub.coords.grad is not None]
    factors = [sub.pending.outside_factor(sub.coords) for sub in due]
    # where backward left zeros, the factor is the one seen everywhere else
    common = next((factor for factor in factors if factor is not None), 1.0)
    seen: dict[int, float] = {}
    for sub, factor in zip(due, factors, strict=True):
        seen.setdefault(id(sub.basis), common if factor is None else factor)
    for basis in dict.fromkeys(sub.basis for sub in due):
        _choose(run, basis, seen[id(basis)])
    if due and run.processes.count > 1:  # bases are compared with test vectors then
        free_test_matrices()


def renew(run: Run) -> None:
    """Change the bases that are learned from sketches, after the step whose backwards gathered these.

    Args:
        run: The run. What is not finite, or zero, leaves the old basis, as in `choose`.
    """
    due = (sub for sub in run.subspaces if sub.basis.due and sub.basis.transform.reads == "sketch")
    # dropping a gradient means its sketch too; where layerwise, the run has dropped it; of workers it is the mean of all
    dropped = run.settings.layerwise is not True and run.settings.rounds is None
    stepped = (sub for sub in due if sub.coords.grad is not None or not dropped)
    several = run.processes.count > 1
    bases = dict.fromkeys(sub.basis for sub in stepped if sub.pending.total is not None or several)
    waiting: list[tuple[Basis, Probes, Sketch]] = []
    for basis in bases:
        subs = [attachment.sub for attachment in run.of(basis)]
        asked = basis.asks(subs[0].coords)
        every = (*asked.learned, *asked.held_out)
        found = gathered(subs, every, subs[0].processes)
        if found is None and several:
            found = sketched(averaged(stacked([nothing(sub, None) for sub in subs]), subs[0].processes), every)
        for sub in subs if several else ():  # what was averaged is a copy
            sub.pending.total = None
        if found is not None:
            waiting.append((basis, asked, found))
    # all flags are computed before the first is read, so that the host waits once
    finite = [torch.stack([p.isfinite().all() for p in found]).all() for _, _, found in waiting]
    nonzero = [torch.stack([p.any() for p in found]).any() for _, _, found in waiting]
    measured: list[tuple[Basis, Tensor | None]] = []
    for good, any_at_all in zip(finite, nonzero, strict=True):
        basis, asked, found = waiting.pop(0)  # the old basis and its sketch are freed before the next one is computed
        count = len(asked.learned)
        if not bool(good):
            basis.warn_once(NOT_FINITE)
        elif bool(any_at_all) and not adaptive.keeps_by(run, basis, found[count:], asked.held_out):
            state, chosen = _proposed(run, basis, basis.transform.learn(basis.fetched(), found[:count], basis.when))
            if not _finite(chosen):
                _warn_of_basis(basis)
                continue
            measured.append((basis, captured(chosen, found[count:], asked.held_out)))
            basis.propose(state, chosen)
            commit(run, basis)
    for basis, energy in measured:
        basis.energy = _number(energy)
    if bases:
        free_test_matrices()


@torch.no_grad()
def schedule(run: Run) -> None:
    """Look ahead to the next step, and change the bases that no gradient decides before its forward.

    Args:
        run: The run. A weight that is not finite leaves the old basis of a transform that reads it.
    """
    adaptive.decide(run)
    for basis in look_ahead(run):
        reads_weight = basis.transform.reads == "weight"
        seen = weights(run, basis) if reads_weight else None
        if reads_weight and seen is None:
            continue
        state, chosen = _proposed(run, basis, basis.transform.refresh(basis.fetched(), seen, basis.when))
        if reads_weight and not _finite(chosen):
            _warn_of_basis(basis)
            continue
        basis.propose(state, chosen)
        commit(run, basis)


def look_ahead(run: Run) -> list[Basis]:
    """Have every basis, and the gradients of its weights, know what the next step is.

    Args:
        run: The run.

    Returns:
        The bases that must be drawn again before that step's forward.
    """
    redrawn = []
    for basis in run.bases:
        redraw, changes = basis.schedule(run.step)
        for attachment in run.of(basis):
            attachment.forget()
            attachment.sub.pending.stale = changes and attachment.sub.coords.grad is not None
            attachment.sub.listen()
        if redraw:
            redrawn.append(basis)
    gathering = run.gathering
    gathering.due = any(basis.due and not basis.idle for basis in run.bases)
    for attachment in run.attachments:
        attachment.prepare()
    if redrawn or any(b.gathers or b.chance for b in run.bases) or any(a.sub.pending.stale for a in run.attachments):
        run.quiet_until = run.step  # not before the next look
    else:
        run.quiet_until = min((basis.quiet_until(run.step) for basis in run.bases), default=run.step + 1000)
    return redrawn


def commit(run: Run, basis: Basis) -> None:
    """Change to the basis that was proposed, if one was, for all weights that use it.

    Args:
        run: The run.
        basis: The basis.
    """
    if basis.proposal is None:
        return
    old, new = basis.map(), basis.proposed_map()
    adaptive.refreshed(run, basis, old, new)
    remainders = []
    for attachment in run.of(basis):
        sub = attachment.sub
        if sub.on_change is not None:
            sub.on_change(old, new)
        with run.stepper.fetched(sub.coords, needed=run.settings.carry != "keep" or run.residuals is not None):
            moments = run.stepper.moments(sub, run.settings.carry, run.groups)
            carried = moments.carried(old, new, sub.name, sub.coords.shape, sub.placed)
            remainders.append((sub, sub.merge(keep=run.settings.keep_remainder)))
            sub.ledger.close(basis.state, old.factors, sub.coords.device)
            if run.residuals is not None:
                run.residuals.changed(sub, old, new, moments, carried)
            moments.replace(carried)
        sub.pending.proposed = False
    basis.commit()
    for sub, remainder in remainders:
        if remainder is not None:
            sub.keep(remainder)


def _choose(run: Run, basis: Basis, factor: float) -> None:
    """Propose a new basis from the gradient that was recorded.

    A gradient that is not finite, or a basis that would not be, leaves the old basis in place and warns once; a zero gradient
    leaves it silently, as does a schedule by which the old one is good enough.

    Args:
        run: The run.
        basis: The basis, ``due``.
        factor: The factor by which other programs scaled ``coords.grad`` since backward.
    """
    subs = [attachment.sub for attachment in run.of(basis)]
    processes = subs[0].processes
    seen = [sub.pending.total for sub in subs]
    parts = [in_whole(one, sub.weight) if isinstance(one, Gradient) else None for one, sub in zip(seen, subs, strict=True)]
    template = next((part for part in parts if part is not None), None)
    if processes.count == 1 and template is None:
        return
    # an absent one is zero; where all are, other ranks found something
    every = [nothing(sub, template) if part is None else part for sub, part in zip(subs, parts, strict=True)]
    local = stacked(every)
    size = processes.reduce(local.norm())  # of the parts, which is not that of their mean, but zero or not finite with it
    norm = float(size) * factor
    if not math.isfinite(norm):
        basis.warn_once(NOT_FINITE)
    if norm == 0.0 or not math.isfinite(norm):
        return
    grad = averaged(local, processes)
    if adaptive.keeps(run, basis, grad):
        return
    state, chosen = _proposed(run, basis, basis.transform.refresh(basis.fetched(), grad, basis.when))
    if not _finite(chosen):
        _warn_of_basis(basis)
        return
    basis.propose(state, chosen)
    for sub, part in zip(subs, every, strict=True):
        if sub.pending.total is not None or processes.count > 1:
            projected = cast(chosen.project(averaged(part, processes)), sub.coords.dtype)
            sub.coords.grad = sub.placed(projected if factor == 1.0 else projected * factor)
    if processes.count == 1:
        grads = [whole(sub.coords.grad) for sub in subs if sub.coords.grad is not None]
        total = torch.stack([chosen.norm(grad) for grad in grads]).norm()
        basis.energy = float(total) / norm
    else:  # the norm of the mean would cost an all-reduce of the whole matrix
        held_out = basis.held_out(subs[0].coords)
        basis.energy = _number(captured(chosen, sketched(grad, held_out), held_out))
    for sub in subs:
        if basis.whole and isinstance(sub.pending.total, Gradient):  # the step itself reads it
            sub.pending.replace(sub.pending.total, sub.coords, factor=factor * sub.pending.factor)
        else:
            sub.pending.forget()
        sub.pending.proposed = True


def _proposed(run: Run, basis: Basis, state: Any) -> tuple[Any, LinearMap]:
    if basis.transform.reads != "nothing":
        run.processes.broadcast(trees.tensors(state))
    return state, basis.transform.map(state)


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _finite(chosen: LinearMap) -> bool:
    return all(bool(t.isfinite().all()) for t in chosen.tensors if t.is_floating_point())


def _warn_of_basis(basis: Basis) -> None:
    basis.warn_once(f"{basis.transform.name} gave a basis that is not finite; the old one stays until the next refresh")
