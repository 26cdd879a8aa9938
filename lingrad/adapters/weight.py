"""Any other parameter: convolutions, embeddings, fused experts, tied weights, models whose modules are not known.

In optimizer mode a hook projects ``weight.grad`` as soon as it is complete and frees it, one weight after the other. In adapter
mode the weight is parametrized as W + S z (``torch.nn.utils.parametrize``), and its gradient is projected inside backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from lingrad._typing import override
from lingrad.adapters.base import Attachment, Coords, Mode, uncompiled
from lingrad.errors import ModeError
from lingrad.gradient import DenseGradient
from lingrad.subspace import Subspace, capture


class WeightAttachment(Attachment):
    """A hook in optimizer mode, a parametrization in adapter mode.

    Args:
        sub: The subspace of the weight.
        weight: The parameter.
        owners: Every (module, attribute) that holds the parameter; several for tied weights, none where only the
            parameter is known, which leaves optimizer mode.
    """

    def __init__(self, sub: Subspace, weight: nn.Parameter, owners: Sequence[tuple[nn.Module, str]] = ()) -> None:
        super().__init__(sub)
        self._weight = weight
        self.owners = list(owners)
        self.handle: Any = None
        self.parametrized = False
        self.orders: list[list[str]] = []

    @property
    @override
    def weight(self) -> nn.Parameter:
        if not self.owners:
            return self._weight
        module, attribute = self.owners[0]
        found = module.parametrizations[attribute].original if self.parametrized else getattr(module, attribute)  # type: ignore[union-attr, index]
        weight: nn.Parameter = found
        return weight

    @override
    def _connect(self, mode: Mode) -> None:
        if mode == "optimizer":
            self.handle = self.weight.register_post_accumulate_grad_hook(self._capture)
            return
        if not self.owners:
            raise ModeError(
                f"adapter mode must change the forward of the layer that uses {self.sub.name}, but only parameters were given; "
                "pass the model itself"
            )
        self.weight.requires_grad_(False)
        self.orders = [list(module._parameters) for module, _ in self.owners]
        for module, attribute in self.owners:
            parametrize.register_parametrization(module, attribute, _Lifted(self.sub), unsafe=True)
        self.parametrized = True

    @override
    def _disconnect(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            return
        for (module, attribute), order in zip(self.owners, self.orders, strict=True):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            for name in order:  # the weight came back as the last of the module's parameters
                module._parameters[name] = module._parameters.pop(name)
        self.parametrized = False
        self.weight.requires_grad_(True)

    def _capture(self, weight: Tensor) -> None:
        grad = weight.grad
        weight.grad = None
        if grad is not None:
            matrix = self.sub.layout.matrix(grad.to_dense() if grad.is_sparse else grad)
            capture(self.sub, DenseGradient(matrix))


class _Lifted(Coords):
    """The parametrization W -> W + S z."""

    def __init__(self, sub: Subspace) -> None:
        super().__init__(sub, active=True)

    @override
    def forward(self, weight: Tensor) -> Tensor:
        lifted: Tensor = _lifted_weight(weight, self.coords, self.sub)
        return lifted


class _LiftedWeight(torch.autograd.Function):
    """W + S z, with project(dW) as the gradient of z."""

    @staticmethod
    @override
    def forward(ctx: Any, weight: Tensor, coords: Tensor, sub: Subspace) -> Tensor:
        ctx.sub = sub
        return weight + sub.layout.restore(sub.map().lift(coords)).to(weight.dtype)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        sub: Subspace = ctx.sub
        matrix = DenseGradient(sub.layout.matrix(grad))
        if sub.due:
            sub.captured.stage(
                DenseGradient(matrix.dense().clone())
            )  # autograd may use its buffer again; a sum writes into ours
        return None, sub.map().project(matrix).to(sub.coords.dtype), None


@uncompiled
def _lifted_weight(*args: Any) -> Any:
    return _LiftedWeight.apply(*args)  # type: ignore[no-untyped-call]
