"""The autograd function of fused experts: each row of an input meets one expert's matrix, and has a small gradient of it.

Of an expert W [m, n] with the basis S z = L z R^T, whose rows are X and whose output has the gradient dY, the gradient of z is
(dY L)^T (X R) for y = x W^T, and (X L)^T (dY R) for y = x W. Neither an expert's m x n gradient nor that of all experts exists,
but in a step that refreshes.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.adapters.functions import once
from lingrad.gradients import DenseGradient, Gradient, RowsGradient
from lingrad.maps.stacked import BatchedMap
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import cast

_ALIGNED = 16  # bytes of which CUDA's grouped products want a row to be a multiple


class Rows:
    """Which rows of an input meet which expert.

    Args:
        ends: The row behind the last one of each expert, int32 [count], on the input's device; or the numbers themselves.
    """

    def __init__(self, ends: Tensor | Sequence[int]) -> None:
        self._ends = ends

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each row with its expert's matrix: [rows, k], [count, k, r] -> [rows, r], in the dtype of ``x``."""
        if self._on_device(x, matrices):
            return nn.functional.grouped_mm(x, matrices, offs=typing.cast(Tensor, self._ends))
        out = x.new_zeros(len(x), matrices.shape[-1])
        for expert, start, end in self._spans(len(x)):
            torch.mm(x[start:end], matrices[expert], out=out[start:end])
        return out

    def outer(self, a: Tensor, b: Tensor, count: int) -> Tensor:
        """``a.T @ b`` of each expert's rows: [rows, p], [rows, q] -> [count, p, q]; zero where an expert has none."""
        if self._on_device(a, b):
            return nn.functional.grouped_mm(a.t(), b, offs=typing.cast(Tensor, self._ends))
        out = a.new_zeros(count, a.shape[1], b.shape[1])
        for expert, start, end in self._spans(len(a)):
            torch.mm(a[start:end].t(), b[start:end], out=out[expert])
        return out

    def _on_device(self, *factors: Tensor) -> bool:
        """Whether the products are one kernel, so that the host need not wait for the numbers."""
        return (
            isinstance(self._ends, Tensor)
            and self._ends.is_cuda
            and all(t.dtype == torch.bfloat16 and t.shape[-1] * t.dtype.itemsize % _ALIGNED == 0 for t in factors)
        )

    def _spans(self, rows: int) -> list[tuple[int, int, int]]:
        ends = self._ends
        if isinstance(ends, Tensor):
            if ends.is_meta:  # a simulation, in which all experts' products take what one's with all rows takes
                return [(0, 0, rows)]
            ends = self._ends = ends.tolist()
        starts = [0, *ends[:-1]]
        return [(expert, start, end) for expert, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]


class Use(NamedTuple):
    """How fused experts are used once.

    Args:
        sub: Their subspace, whose map is a `BatchedMap`.
        rows: Which rows of the input meet which of them.
        expert: The one that all rows meet; None where they meet several.
        turned: Whether y = x W, not x W^T.
    """

    sub: Subspace
    rows: Rows
    expert: int | None
    turned: bool

    def sides(self, current: BatchedMap, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """What reduces the input, and what reduces the gradient of the output, [count, ., r]; None for the identity."""
        left, right = (None if t is None else cast(self._own(t), dtype) for t in (current.left, current.right))
        return (left, right) if self.turned else (right, left)

    def coords(self, dtype: torch.dtype) -> Tensor:
        """Coordinates of the experts used, [count, r of the input, r of the output]."""
        sub = self.sub
        blocks = self._own(sub.coords.detach().unflatten(0, (_map(sub).count, -1))).to(dtype)
        return blocks if self.turned else blocks.mT

    def _own(self, blocks: Tensor) -> Tensor:
        return blocks if self.expert is None else blocks[self.expert : self.expert + 1]


class ExpertProduct(torch.autograd.Function):
    """``out`` (+ x (S z)^T where ``active``), with the projected gradient of the weight as that of z."""

    @staticmethod
    @override
    def forward(ctx: Any, out: Tensor, x: Tensor, token: Tensor, use: Use, active: bool) -> Tensor:
        sub, rows = use.sub, use.rows
        ctx.use, ctx.due, ctx.refreshes, ctx.active = use, sub.basis.gathers, sub.basis.refreshes, active
        x = cast(x, out.dtype).reshape(-1, x.shape[-1])
        of_input, of_output = use.sides(_map(sub), out.dtype)
        reduced = x if of_input is None else rows.times(x, of_input)
        coords = use.coords(out.dtype) if active else None
        ctx.save_for_backward(x if ctx.due else reduced, coords)
        if coords is None:
            return out.detach()
        added = rows.times(reduced, coords)
        added = added if of_output is None else rows.times(added, of_output.mT)
        return out + added.view(out.shape)

    @staticmethod
    @once
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        use: Use = ctx.use
        sub, rows = use.sub, use.rows
        sub.basis.map_after(ctx.refreshes, sub.name)
        x, coords = ctx.saved_tensors
        grad = out_grad.reshape(-1, out_grad.shape[-1])
        of_input, of_output = use.sides(_map(sub), grad.dtype)
        small = grad if of_output is None else rows.times(grad, of_output)
        x_grad = None
        if coords is not None and ctx.needs_input_grad[1]:
            x_grad = rows.times(small, coords.mT)
            x_grad = x_grad if of_input is None else rows.times(x_grad, of_input.mT)
            x_grad = x_grad.view(*out_grad.shape[:-1], x_grad.shape[-1])
        reduced = x if not ctx.due or of_input is None else rows.times(x, of_input)
        count = _map(sub).count if use.expert is None else 1
        projected = rows.outer(reduced, small, count) if use.turned else rows.outer(small, reduced, count)
        projected = projected.flatten(0, 1)
        if ctx.due:
            dtype = (
                torch.float32 if grad.dtype == torch.float16 else grad.dtype
            )  # entries may overflow where projections do not
            a, b = (x, grad) if use.turned else (grad, x)
            matrices = rows.outer(a.to(dtype), b.to(dtype), count)
            seen: Gradient = DenseGradient(matrices.flatten(0, 1))
            if use.expert is not None:
                seen = RowsGradient(seen, use.expert * seen.shape[0], sub.basis.shape[0])
            sub.record(seen, projected)
        projected = cast(projected, sub.coords.dtype)
        if use.expert is None:
            projected = sub.processes.average(projected)
        return out_grad, x_grad, projected, None, None


class Tokens(torch.autograd.Function):
    """One tensor for each expert, without memory, whose gradient [p, q] becomes that expert's part of the coordinates'."""

    @staticmethod
    @override
    def forward(ctx: Any, coords: Tensor, sub: Subspace, done: Callable[[], None]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sub, ctx.shape, ctx.like, ctx.done = sub, coords.shape, coords.detach(), done
        count = sub.weight.param.shape[0]
        p, q = coords.shape[0] // count, coords.shape[1]
        return tuple(torch.empty_strided((p, q), (0, 0), dtype=coords.dtype, device=coords.device) for _ in range(count))

    @staticmethod
    @once
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.done()
        total = torch.zeros(ctx.shape, dtype=ctx.like.dtype, device=ctx.like.device)
        for block, grad in zip(total.chunk(len(grads)), grads, strict=True):
            if grad is not None:
                block.copy_(grad)
        return ctx.sub.processes.average(total), None, None


def _map(sub: Subspace) -> BatchedMap:
    current = sub.map()
    assert isinstance(current, BatchedMap)  # noqa: S101 - else none of this is called
    return current
