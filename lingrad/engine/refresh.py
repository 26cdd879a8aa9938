"""How a basis changes: chosen from the gradient within the step, from a sketch after it, or drawn before the next.

Weights that share a basis change together; ``members`` are their subspaces, the leader first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lingrad.engine.moments import Moments
from lingrad.gradients.averaged import averaged
from lingrad.gradients.base import Gradient
from lingrad.gradients.local import FactoredGradient
from lingrad.gradients.stacked import StackedGradient
from lingrad.maps import LinearMap
from lingrad.parallel import average, ranks, share
from lingrad.subspaces import trees as trees
from lingrad.subspaces.gather import Questions, energy, gathered, questions, witnesses
from lingrad.subspaces.subspace import Proposal, Subspace
from lingrad.transforms.base import Sketch
from lingrad.transforms.sketch import sketched

NOT_FINITE = "the gradient at a refresh is not finite; the old basis stays until the next one"

Commit = Callable[[Subspace], None]


class Weight(Protocol):
    """A weight as a change of its basis sees it."""

    def merge(self) -> Tensor | None:
        """Merge the coordinates; what could not be merged and is to be kept comes back, [m, n]."""

    def keep(self, current: LinearMap, remainder: Tensor) -> None:
        """Keep what could not be merged, in the coordinates of the new basis."""


def choose(members: Sequence[Subspace], factor: float) -> None:
    """Choose a new basis from the captured gradient; each ``coords.grad`` becomes its projection.

    A gradient that is not finite, or a basis that would not be, leaves the old basis in place and says so once; a zero gradient
    leaves it silently.

    Args:
        members: The subspaces, ``due``, of a transform that reads the gradient.
        factor: The factor by which other programs scaled ``coords.grad`` since backward.
    """
    lead = members[0]
    parts = [sub.captured.total if isinstance(sub.captured.total, Gradient) else None for sub in members]
    like = next((part for part in parts if part is not None), None)
    if lead.proposal is not None or (ranks() == 1 and like is None):
        return
    # an absent one is zero; where all are, other ranks found something
    whole = [_nothing(sub, like) if part is None else part for sub, part in zip(members, parts, strict=True)]
    local = whole[0] if len(whole) == 1 else StackedGradient(whole)
    size = average(local.norm())  # of the parts, which is not that of their mean, but zero or not finite with it
    norm = float(size) * factor
    if not math.isfinite(norm):
        lead.warn_once(NOT_FINITE)
    if norm == 0.0 or not math.isfinite(norm):
        return
    grad = averaged(local)
    proposal = _propose(lead, grad)
    if not _finite(proposal):
        _say_basis(lead)
        return
    chosen = proposal.map
    for sub, part in zip(members, whole, strict=True):
        sub.proposal = proposal
        if sub.captured.total is not None or ranks() > 1:
            projected = chosen.project(averaged(part)).to(sub.coords.dtype)
            sub.coords.grad = projected if factor == 1.0 else projected * factor
    if ranks() == 1:
        total = torch.stack([chosen.norm(sub.coords.grad) for sub in members if sub.coords.grad is not None]).norm()
        lead.energy = float(total) / norm
    else:  # the norm of the mean would cost an all-reduce of the whole matrix
        asked = witnesses(lead)
        lead.energy = _number(energy(chosen, sketched(grad, asked), asked))
    for sub in members:
        sub.captured.forget()


def renew(groups: Sequence[Sequence[Subspace]], commit: Commit) -> None:
    """Change the bases that are learned from sketches, after the step that gathered these.

    What is not finite, or zero, leaves the old basis, as in `choose`.

    Args:
        groups: The subspaces that are due, each with those that share its basis.
        commit: Moves one subspace over to its proposal.
    """
    waiting: list[tuple[Sequence[Subspace], Questions, Sketch]] = []
    for members in groups:
        asked = questions(members[0])
        found = gathered(members, (*asked.probes, *asked.witnesses))
        if found is None and ranks() > 1:
            blank = _nothing(members[0], None) if len(members) == 1 else StackedGradient([_nothing(s, None) for s in members])
            found = sketched(averaged(blank), (*asked.probes, *asked.witnesses))
        if found is not None:
            waiting.append((members, asked, found))
    finite = [torch.stack([p.isfinite().all() for p in found]).all() for _, _, found in waiting]
    nonzero = [torch.stack([p.any() for p in found]).any() for _, _, found in waiting]
    measured: list[tuple[Subspace, Tensor | None]] = []
    for (members, asked, found), good, any_at_all in zip(waiting, finite, nonzero, strict=True):
        lead, count = members[0], len(asked.probes)
        if not bool(good):
            lead.warn_once(NOT_FINITE)
        elif bool(any_at_all):
            proposal = _proposed(lead, lead.transform.learn(lead.state, found[:count], lead.when))
            if not _finite(proposal):
                _say_basis(lead)
                continue
            measured.append((lead, energy(proposal.map, found[count:], asked.witnesses)))
            exchange(members, proposal, commit)
    for lead, captured in measured:
        lead.energy = _number(captured)


def redraw(members: Sequence[Subspace], commit: Commit) -> None:
    """Change a basis that no gradient decides, before the forward that will use it.

    Args:
        members: The subspaces that share it.
        commit: Moves one subspace over to its proposal.
    """
    exchange(members, _propose(members[0], None), commit)


def exchange(members: Sequence[Subspace], proposal: Proposal, commit: Commit) -> None:
    """Move all over to a new basis; what is in their gradients belongs to the old one.

    Args:
        members: The subspaces, the leader first.
        proposal: The new basis.
        commit: Moves one subspace over to its proposal.
    """
    for sub in reversed(members):  # the leader holds the old map, which the others merge through
        sub.proposal = proposal
        commit(sub)


def commit(sub: Subspace, weight: Weight, moments: Moments) -> None:
    """Move over to the basis that was chosen, if one was: merge through the old map, carry the moments.

    Args:
        sub: The subspace; one that leads comes after those that share its basis.
        weight: The weight.
        moments: The base optimizer's memory of the coordinates.
    """
    if sub.proposal is None:
        return
    carried = moments.rotated(sub.map(), sub.proposal.map, sub.name, sub.coords.shape)
    remainder = weight.merge()
    if sub.ledger is not None:
        sub.ledger.close((sub.leader or sub).state, sub.map().factors)
    if moments.carry == "reset":
        moments.state.clear()
        moments.state.update(moments.initial())
    moments.replace(carried)
    state, chosen = sub.proposal
    sub.replace_state(state if sub.leader is None else None, sub.refreshes + 1, chosen)
    sub.proposal, sub.due = None, False
    if remainder is not None:
        weight.keep(chosen, remainder)


def _propose(lead: Subspace, grad: Gradient | None) -> Proposal:
    return _proposed(lead, lead.transform.refresh(lead.state, grad, lead.when))


def _proposed(lead: Subspace, state: Any) -> Proposal:
    if lead.transform.reads != "nothing":
        share(trees.tensors(state))
    return Proposal(state, lead.transform.map(state))


def _nothing(sub: Subspace, like: Gradient | None) -> FactoredGradient:
    """A gradient of no tokens, which is zero."""
    m, n = sub.layout.shape
    dtype = sub.coords.dtype if like is None else like.dtype
    return FactoredGradient(sub.coords.new_empty(0, m, dtype=dtype), sub.coords.new_empty(0, n, dtype=dtype))


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _finite(proposal: Proposal) -> bool:
    return all(bool(t.isfinite().all()) for t in proposal.map.tensors if t.is_floating_point())


def _say_basis(lead: Subspace) -> None:
    lead.warn_once(f"{lead.transform.name} gave a basis that is not finite; the old one stays until the next refresh")
