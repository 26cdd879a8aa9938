"""Projected backward: the weight gradient of a linear layer is born in the small space.

The layer itself runs as it is, with its weight frozen, so that its forward is the plain layer's to the bit and any kernel
serves (nn.Linear, Conv1D of GPT-2). A forward hook then ties the output to the coordinates by an autograd function whose
backward is project(dY^T X), at a cost of O(T r (m + n)) for T tokens; in adapter mode it also adds S z acting on the input.
No m x n gradient exists off refresh steps, where a right map also keeps X Q [T, q] of the input
instead of X [T, n]; a step that refreshes keeps the two factors, or the matrix where it is smaller.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lingrad._typing import override
from lingrad.adapters.base import CHILD, Attachment, Coords, Mode, uncompiled
from lingrad.errors import ModeError
from lingrad.gather import note
from lingrad.gradient import FactoredGradient
from lingrad.subspace import Subspace


class LinearAttachment(Attachment):
    """Projected backward for one linear layer, in both modes.

    Args:
        sub: The subspace of the layer's weight.
        module: The layer; its ``forward`` maps x [..., n] to [..., m] and uses the weight in no other way.
        attribute: The weight's name in the layer.
    """

    def __init__(self, sub: Subspace, module: nn.Module, attribute: str) -> None:
        super().__init__(sub)
        self.module = module
        self.attribute = attribute
        self.holder = Coords(sub, active=False)
        self.handles: list[Any] = []

    @property
    @override
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = getattr(self.module, self.attribute)
        return weight

    @override
    def _connect(self, mode: Mode) -> None:
        self.holder.active = mode == "adapter"
        self.sub.coords.requires_grad_(self.weight.requires_grad)
        self.module.add_module(CHILD, self.holder)
        # first of all hooks: those of others see the layer's output as it will be
        self.handles = [
            self.module.register_forward_pre_hook(self._freeze, prepend=True),
            self.module.register_forward_hook(self._tie, prepend=True, with_kwargs=True),
        ]
        self.weight.requires_grad_(False)

    @override
    def _disconnect(self) -> None:
        for handle in self.handles:
            handle.remove()
        delattr(self.module, CHILD)
        self.weight.requires_grad_(self.sub.coords.requires_grad)

    def _freeze(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.attribute not in module._parameters:
            raise ModeError(
                f"{self.sub.name} was parametrized (weight_norm and the like) after it was wrapped, and its updates would be "
                "lost; parametrize first, then call lingrad"
            )
        # model.requires_grad_(True) means the coordinates, which it reaches too
        if self.weight.requires_grad:
            self.weight.requires_grad_(False)

    def _tie(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        active = self.holder.active
        if not active and not (torch.is_grad_enabled() and self.sub.coords.requires_grad):
            return out
        tied: Tensor = _projected(out, x, self.sub.coords, self.sub, active)
        return tied


class _Projected(torch.autograd.Function):
    """``out`` (+ x lifted(z)^T in adapter mode), with project(dY^T X) as the gradient of z."""

    @staticmethod
    @override
    def forward(ctx: Any, out: Tensor, x: Tensor, coords: Tensor, sub: Subspace, active: bool) -> Tensor:
        current = sub.map()
        x = x.to(out.dtype)  # under autocast the layer computed in out's dtype, and so does its gradient
        reduced = current.reduce(x)
        ctx.sub, ctx.active, ctx.due, ctx.refreshes = sub, active, sub.due, sub.refreshes
        ctx.borrowed = x.is_leaf
        ctx.save_for_backward(x if sub.due else reduced, coords if active else None)
        # out.detach(): returned as it is, an input would come back as a view that later in-place layers must not touch
        return out + current.inner.apply(reduced, coords) if active else out.detach()

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        sub: Subspace = ctx.sub
        if sub.refreshes != ctx.refreshes:
            raise ModeError(
                f"the basis of {sub.name} was refreshed between this forward and its backward; "
                "run step() after the backward of every forward of the step"
            )
        kept, coords = ctx.saved_tensors
        current = sub.map()
        x_grad = current.T.apply(out_grad, coords.t()) if ctx.active and ctx.needs_input_grad[1] else None
        grad = FactoredGradient(out_grad.reshape(-1, out_grad.shape[-1]), kept.reshape(-1, kept.shape[-1]))
        projected = (current if ctx.due else current.inner).project(grad)
        if ctx.due:  # an input that no layer made may be a buffer its owner fills again
            note(sub, grad, projected, (lambda: FactoredGradient(grad.out_grad, grad.input.clone())) if ctx.borrowed else None)
        return out_grad, x_grad, projected.to(sub.coords.dtype), None, None


@uncompiled
def _projected(*args: Any) -> Any:
    return _Projected.apply(*args)  # type: ignore[no-untyped-call]
