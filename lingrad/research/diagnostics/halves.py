"""How many directions of a gradient two halves of a batch agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import require
from lingrad.research.diagnostics.base import Diagnostic, ObservedRun, average
from lingrad.research.diagnostics.bases import orthonormal
from lingrad.research.task import mapped, tensors_of

TIMES = 20  # in a run, at most


class ReproducibleDirections(Diagnostic):
    """k*: how many directions of a basis come from the data, not from the choice of the batch; mean over weights.

    At a step whose gradient is read for a basis, the gradient of each half of its rows is computed. The leading r singular
    vectors of the two, on the side of the basis, span two subspaces, and k* counts the principal angles between them whose
    cosine is above a threshold (Björck, Golub, 1973: the cosines are the singular values of U_1^T U_2). Of two-sided bases the
    side with fewer counts.

    Random subspaces agree in some directions too, the more, the larger r is beside the weight's side. Their count, for seeded
    random bases of the same shapes, is ``reproducible_by_chance``.

    It costs two forwards and backwards of half a batch and two SVDs of each weight, in a second model, at most `TIMES` times
    in a run. Bases that read no gradient are left out, and so are fused experts.

    Args:
        threshold: Of the cosine, between 0 and 1; 0.5 is an angle of 60 degrees, at which a direction of one basis has a
            quarter of its square in the other.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        right = isinstance(threshold, int | float) and 0.0 < threshold < 1.0
        require(right, "threshold", f"threshold of the diagnostic 'reproducible' must be between 0 and 1, not {threshold!r}")
        self.threshold = float(threshold)
        self._found: dict[str, float] = {}
        self._model: nn.Module | None = None
        self._chance: dict[tuple[int, int], int] = {}
        self._next = 0

    @override
    def begin(self, run: ObservedRun) -> None:
        super().begin(run)
        self._step = 0

    @override
    def before(self, batch: Any) -> None:
        self._found = {}
        step, self._step = self._step, self._step + 1
        subs = [
            sub for one in self.run.optimizers for sub in one.subspaces if sub.basis.due and sub.basis.transform.blocks == 1
        ]
        rows = _rows(batch)
        if not subs or step < self._next or rows < 2:
            return
        self._next = step + max(1, self.run.steps // TIMES)
        first, second = (self._gradients(_half(batch, rows, part)) for part in (0, 1))
        if not all(bool(grad.isfinite().all()) for grad in (*first.values(), *second.values())):
            return
        counts, chances = [], []
        for sub in subs:
            grads = [sub.weight.layout.matrix(grads[sub.name]).double() for grads in (first, second)]
            sides = [(rank, side) for side, rank in enumerate(sub.basis.transform.ranks(sub.weight.layout.shape)) if rank]
            if sides:
                counts.append(min(self._agreed(*(_leading(grad, rank, side) for grad in grads)) for rank, side in sides))
                chances.append(min(self._by_chance(sub.weight.layout.shape[side], rank) for rank, side in sides))
        if counts:
            self._found = {"reproducible": average(counts), "reproducible_by_chance": average(chances)}

    @override
    def after(self, step: int) -> Mapping[str, float]:
        return self._found

    @torch.enable_grad()
    def _gradients(self, batch: Any) -> dict[str, Tensor]:
        """The gradients of the weights of the run, of a batch, by a model of its own."""
        if self._model is None:
            with self.run.aside():
                self._model = self.run.task.build(self.run.seed, self.run.dtype).to(self.run.device).train()
        with torch.no_grad():
            weights = {name: weight for one in self.run.optimizers for name, weight in one.weights().items()}
            buffers = dict(self.run.training.model.named_buffers())
            for name, param in self._model.named_parameters():
                param.requires_grad_(name in weights)
                if name in weights:
                    param.copy_(weights[name])
            for name, buffer in self._model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        self._model.zero_grad()
        self.run.task.loss(self._model, batch).backward()
        params = self._model.named_parameters()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in params if name in weights}
        self._model.zero_grad()
        return found

    def _agreed(self, one: Tensor, other: Tensor) -> int:
        cosines = torch.linalg.svdvals(one.t() @ other)
        return int((cosines > self.threshold).sum())

    def _by_chance(self, size: int, rank: int) -> int:
        if (size, rank) not in self._chance:
            generator = torch.Generator().manual_seed(0)
            pair = [orthonormal(torch.randn(size, rank, generator=generator, dtype=torch.float64)) for _ in range(2)]
            self._chance[size, rank] = self._agreed(*pair)
        return self._chance[size, rank]


def _leading(grad: Tensor, rank: int, side: int) -> Tensor:
    """The leading singular vectors on a side, 0 the left one; fewer than ``rank`` where the gradient has not as many."""
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    clear = int((s > s.max() * max(grad.shape) * torch.finfo(grad.dtype).eps).sum())
    vectors: Tensor = u if side == 0 else vh.t()
    return vectors[:, : min(rank, clear)]


def _rows(batch: Any) -> int:
    """Rows of a batch: the length of all its tensors, or 0 where they differ."""
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors_of(batch)}
    return lengths.pop() if len(lengths) == 1 else 0


def _half(batch: Any, rows: int, part: int) -> Any:
    """The first or the second half of a batch's rows, copied."""
    kept = slice(rows // 2) if part == 0 else slice(rows // 2, rows // 2 * 2)
    return mapped(batch, lambda tensor: tensor[kept].clone())
