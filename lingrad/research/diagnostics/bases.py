"""Diagnostics of bases: what they capture, how far they turn, what that does to moments, and the rank of all steps together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.config.settings import MOVES
from lingrad.config.targets import resolve_model
from lingrad.research.diagnostics.base import BasisChange, Diagnostic, ObservedRun, average

TOLERANCE = 1e-3  # of the largest singular value, up to which one counts as zero


class CapturedEnergy(Diagnostic):
    """The share of its gradient that a fresh basis captures, |S S^T G| / |G|: the mean over weights, at each refresh."""

    @override
    def begin(self, run: ObservedRun) -> None:
        super().begin(run)
        self._refreshes = self._count()

    @override
    def after(self, step: int) -> Mapping[str, float]:
        before, self._refreshes = self._refreshes, self._count()
        if before == self._refreshes:
            return {}
        energies = [value for one in self.run.optimizers for value in one.captured_energy().values()]
        return {"energy": average(energies)} if energies else {}

    def _count(self) -> int:
        return sum(sum(one.refreshes().values()) for one in self.run.optimizers)


class BasisOverlap(Diagnostic):
    """How much of the old span is in the new one, |Q_new^T Q_old|_F^2 / r, with orthonormal columns Q: mean over weights.

    1 is the same span; two random spans of r of m dimensions have r / m. The basis of the start, which no gradient has chosen,
    is not compared. Of two-sided bases it is the product over the sides. Weights without a basis for the whole matrix (`full`,
    fused experts) are left out.
    """

    @override
    def begin(self, run: ObservedRun) -> None:
        super().begin(run)
        run.listen()

    @override
    def after(self, step: int) -> Mapping[str, float]:
        found = [overlap for change in self.run.changes if not change.first and (overlap := _overlap(change)) is not None]
        return {"overlap": average(found)} if found else {}


class MomentMismatch(Diagnostic):
    """How far a refresh leaves the mean of gradients from the one in the new basis, |m_kept - C m| / |m|, C = S_new^T S_old.

    C m is what ``carry="rotate"`` and ``"transport"`` make of the mean m; with these two the mismatch is 0. With ``keep``
    m_kept is m, with ``reset`` it is zero. It is taken over all means that the base keeps, and averaged over weights; a base
    without one (SGD without momentum, Adafactor) has no mismatch.
    """

    @override
    def begin(self, run: ObservedRun) -> None:
        super().begin(run)
        run.listen(means=True)

    @override
    def after(self, step: int) -> Mapping[str, float]:
        found = [mismatch for change in self.run.changes if (mismatch := _mismatch(change)) is not None]
        return {"mismatch": average(found)} if found else {}


class UpdateRank(Diagnostic):
    """The rank of what the run has made of a weight, W_t - W_0, after each quarter of the steps: mean over weights.

    ``stable_rank`` is |D|_F^2 / |D|_2^2, and ``numeric_rank`` counts the singular values above `TOLERANCE` of the largest. It
    keeps a copy of the weights in host memory. Methods that wrap the model, such as LoRA, are left out, and so are weights that
    have not changed, or are not finite.
    """

    @override
    def begin(self, run: ObservedRun) -> None:
        super().begin(run)
        self._at = run.marks(4)
        self._start = self._weights()

    @override
    def after(self, step: int) -> Mapping[str, float]:
        if step not in self._at:
            return {}
        stable, numeric = [], []
        for name, weight in self._weights().items():
            change = (weight - self._start[name]).double()
            squares = torch.linalg.svdvals(torch.where(change.isfinite().all(), change, 0.0)).square()
            if squares[0] > 0:
                stable.append(float(squares.sum() / squares[0]))
                numeric.append(float((squares > TOLERANCE**2 * squares[0]).sum()))
        return {"stable_rank": average(stable), "numeric_rank": average(numeric)} if stable else {}

    @torch.no_grad()
    def _weights(self) -> dict[str, Tensor]:
        """The weights that are transformed, or would be by rules that name none, as matrices [m, n] in host memory."""
        wide = torch.float64 if self.run.dtype == torch.float64 else torch.float32
        subs = [sub for one in self.run.optimizers for sub in one.subspaces]
        if subs:
            found = {sub.name: sub.weight.layout.matrix(sub.effective(wide)) for sub in subs}
        elif self.run.training.model is self.run.model:
            targets = resolve_model(self.run.model, "full()").targets
            found = {target.name: target.layout.matrix(target.param.detach()) for target in targets}
        else:
            found = {}
        return {name: matrix.to("cpu", wide, copy=True) for name, matrix in found.items()}


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the span of others, in float64; as many as are independent."""
    u, s, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    clear: Tensor = u[:, s > s.max() * max(columns.shape) * torch.finfo(columns.dtype).eps]
    return clear


def _overlap(change: BasisChange) -> float | None:
    basis = change.sub.basis
    ranks, found = basis.transform.ranks(basis.shape), 1.0
    if basis.transform.blocks > 1 or ranks == (None, None):
        return None
    sides = zip(ranks, (change.old.inner, change.old.T.inner), (change.new.inner, change.new.T.inner), strict=True)
    for rank, old, new in sides:
        if rank is not None:
            eye = torch.eye(rank, dtype=change.sub.coords.dtype, device=change.sub.coords.device)
            before, after = orthonormal(old.lift(eye)), orthonormal(new.lift(eye))
            found *= float((after.t() @ before).square().sum()) / max(before.shape[1], after.shape[1], 1)
    return found


def _mismatch(change: BasisChange) -> float | None:
    size = sum(float(mean.double().square().sum()) for mean in change.means)
    if size == 0.0:
        return None
    if change.carry in MOVES:
        return 0.0
    apart: float = 0.0
    for mean in change.means:
        moved: Any = change.new.transport(change.old, mean)
        kept = torch.zeros_like(mean) if change.carry == "reset" else mean
        apart += float((kept - moved).double().square().sum())
    return math.sqrt(apart / size)
