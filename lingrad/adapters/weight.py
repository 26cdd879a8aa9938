"""Any other parameter: convolutions, embeddings, fused experts, tied weights, models whose modules are not known.

In optimizer mode a hook projects ``weight.grad`` as soon as it is complete and frees it, one weight after the other. In adapter
mode the weight is parametrized as W + S z (``torch.nn.utils.parametrize``), and its gradient is projected inside backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lingrad.adapters.base import CHILD, Attachment, Coords, Mode, once, uncompiled
from lingrad.errors import ModeError
from lingrad.gradients.local import DenseGradient
from lingrad.parallel import average
from lingrad.subspaces.gather import capture, note
from lingrad.subspaces.subspace import Subspace, call

# A module of these calls every child in its forward, and holds parameters of its own only in a subclass.
_RUN_THEIR_CHILDREN = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WeightAttachment(Attachment):
    """A hook in optimizer mode, a parametrization in adapter mode.

    Args:
        sub: The subspace of the weight.
        weight: The parameter.
        owners: Every (module, attribute) that holds the parameter; several for tied weights, none where only the
            parameter is known, which leaves optimizer mode.
        plain: See `Attachment`.
    """

    averages = True

    def __init__(
        self, sub: Subspace, weight: nn.Parameter, owners: Sequence[tuple[nn.Module, str]] = (), *, plain: bool = False
    ) -> None:
        super().__init__(sub, plain=plain)
        self._weight = weight
        self.owners = list(owners)
        self.handle: Any = None
        self.parametrized = False
        self.orders: list[list[str]] = []
        self.holder = Coords(sub, active=False)

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
            weight, trains = self.weight, self.weight.requires_grad
            self.sub.coords.requires_grad_(trains)
            arrived = weakref.WeakMethod(self._capture)  # a cycle through a tensor's hooks would never be freed
            self.handle = weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(call, arrived))
            weight.requires_grad_(trains)
            for module, attribute in self.owners[:1]:
                if not isinstance(module, _RUN_THEIR_CHILDREN):
                    module.add_module(f"{CHILD}_{attribute}", self.holder)
            return
        if not self.owners:
            raise ModeError(
                f"adapter mode must change the forward of the layer that uses {self.sub.name}, but only parameters were given; "
                "pass the model itself"
            )
        for module, _ in self.owners:
            if getattr(module, "max_norm", None) is not None:
                raise ModeError(
                    f"{self.sub.name} is an embedding with max_norm, which rescales its rows in every forward; in adapter mode "
                    "these are not the rows that are trained. Use optimizer mode, or leave this weight out by a rule: 'none'"
                )
        self.sub.coords.requires_grad_(self.weight.requires_grad)
        self.weight.requires_grad_(False)
        self.orders = [list(module._parameters) for module, _ in self.owners]
        for module, attribute in self.owners:
            parametrize.register_parametrization(module, attribute, _Lifted(self.sub, active=not self.plain), unsafe=True)
        self.parametrized = True

    @override
    def _places(self) -> list[tuple[nn.Module, str, str]]:
        return [(module, name, f"parametrizations.{name}.original") for module, name in self.owners]

    @override
    def _disconnect(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            for module, attribute in self.owners[:1]:
                module._modules.pop(f"{CHILD}_{attribute}", None)
            return
        for (module, attribute), order in zip(self.owners, self.orders, strict=True):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            # the weight came back as the last of the module's parameters; others of them may be parametrized still
            for name in [name for name in order if name in module._parameters]:
                module._parameters[name] = module._parameters.pop(name)
        self.parametrized = False
        self.weight.requires_grad_(self.sub.coords.requires_grad)

    def _capture(self, weight: Tensor) -> None:
        grad = weight.grad
        weight.grad = None
        if grad is not None:
            capture(self.sub, DenseGradient(self.sub.layout.matrix(_dense(grad))))


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


class _Lifted(Coords):
    """The parametrization W -> W + S z."""

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
    @once
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        sub: Subspace = ctx.sub
        matrix = DenseGradient(sub.layout.matrix(_dense(grad)))
        projected = sub.map().project(matrix)
        if sub.due:  # autograd may use its buffer again; a sum writes into ours
            note(sub, matrix, projected, lambda: DenseGradient(matrix.dense().clone()))
        return None, average(projected.to(sub.coords.dtype)), None


@uncompiled
def _lifted_weight(*args: Any) -> Any:
    return _LiftedWeight.apply(*args)  # type: ignore[no-untyped-call]
