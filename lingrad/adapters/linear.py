"""Projected backward: the weight gradient of a linear layer is born in the small space.

The layer's forward is replaced. In optimizer mode the plain one runs as it is, with its weight frozen, so that its output is
the plain layer's to the bit, and is then tied to the coordinates by an autograd function whose backward is project(dY^T X).
In adapter mode the layer acts as W + S z; where somebody else had replaced its forward, the tie adds S z to what that gives.

What a step costs, of T tokens, in multiplications and additions: the forward, 2 T m n, and the gradient of the input, 2 T m n,
as in the plain layer; in place of the weight gradient, 2 T m n, its projection: 2 T r (m + n) with a basis on one side,
2 T (n q + m p + p q) with bases on both. No m x n gradient exists, but where a refresh reads it; off refresh steps a right map
keeps X Q [T, q] of the input instead of X [T, n]. Adapter mode adds the product with S z to the forward and to the gradient of
the input: by way of the coordinates, 2 T r (2 m + n) with a right basis, 2 T r (m + 2 n) with a left one, or by forming W + S z
twice, 4 m n r, one layer at a time, whichever is less (`LinearMap.lifts_cheaper`). Coordinates of a wider dtype than the
weight's are never rounded into it so: they go the first way.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.adapters.base import CHILD, Attachment, Coords, Mode, once, uncompiled
from lingrad.errors import ModeError
from lingrad.gradients.local import FactoredGradient
from lingrad.maps import LinearMap
from lingrad.subspaces.gather import note
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import cast


class LayerAttachment(Attachment):
    """The forward of one linear layer replaced, in both modes.

    Args:
        sub: The subspace of the layer's weight.
        module: The layer; its ``forward`` maps x [..., n] to x W^T + b [..., m] and uses the weight in no other way.
        attribute: The weight's name in the layer.
        plain: See `Attachment`.
    """

    def __init__(self, sub: Subspace, module: nn.Module, attribute: str, *, plain: bool = False) -> None:
        super().__init__(sub, plain=plain)
        self.module = module
        self.attribute = attribute
        self.holder = Coords(sub, active=False)
        self.mode: Mode | None = None
        self.before: Any = None  # a forward that somebody had put in the place of the class's own
        self.buried = False  # whether somebody has put theirs in the place of ours

    @property
    @override
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = getattr(self.module, self.attribute)
        return weight

    @override
    def _connect(self, mode: Mode) -> None:
        self.holder.active = mode == "adapter" and not self.plain
        self.module.add_module(CHILD, self.holder)
        there = vars(self.module).get("forward")
        if not self.buried or there is None:
            self.before = there
            vars(self.module)["forward"] = self._forward
        self.mode = mode

    @override
    def _places(self) -> list[tuple[nn.Module, str, str]]:
        return [(self.module, self.attribute, self.attribute)]

    @override
    def _disconnect(self) -> None:
        self.mode = None
        self.buried = self.replaced  # somebody came after us, and goes on calling ours
        if not self.buried:
            del vars(self.module)["forward"]
            if self.before is not None:
                vars(self.module)["forward"] = self.before
        delattr(self.module, CHILD)

    @property
    @override
    def replaced(self) -> bool:
        return vars(self.module).get("forward") != self._forward

    @abstractmethod
    def _forward(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def _tie(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer's own forward, tied to the coordinates."""
        out, coords = self._plain(*args, **kwargs), self.sub.coords
        active = self.mode == "adapter"
        if not active and not (torch.is_grad_enabled() and coords.requires_grad):
            return out
        x = args[0] if args else next(iter(kwargs.values()))
        tied: Tensor = run(_Tied, out, x, coords, self.sub, active)
        return tied

    def _plain(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.before is not None:
            given: Tensor = self.before(*args, **kwargs)
            return given
        out: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return out


@final
class LinearAttachment(LayerAttachment):
    """Projected backward for one linear layer; arguments as for `LayerAttachment`."""

    @override
    def _connect(self, mode: Mode) -> None:
        self.sub.coords.requires_grad_(self.weight.requires_grad)
        super()._connect(mode)
        self.weight.requires_grad_(False)

    @override
    def _disconnect(self) -> None:
        super()._disconnect()
        self.weight.requires_grad_(self.sub.coords.requires_grad)

    @override
    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, coords = self.module._parameters.get(self.attribute), self.sub.coords
        if self.mode is None:
            return self._plain(*args, **kwargs)
        if weight is None:
            raise ModeError(
                f"{self.sub.name} was parametrized (weight_norm and the like) after it was wrapped, and its updates would be "
                "lost; parametrize first, then call lingrad"
            )
        if weight.requires_grad:  # model.requires_grad_(True) means the coordinates, which it reaches too
            weight.requires_grad_(False)
        if self.mode == "optimizer" or self.before is not None:
            return self._tie(args, kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        bias, trains = self.module._parameters.get("bias"), torch.is_grad_enabled() and coords.requires_grad
        acted: Tensor = run(_Adapted, x, bias, coords, weight, self.sub, trains)
        return acted


class _Kept:
    """What the backward of one layer's forward goes by."""

    def __init__(self, sub: Subspace, x: Tensor) -> None:
        self.sub, self.due, self.refreshes = sub, sub.due, sub.refreshes
        self.borrowed = x.is_leaf  # an input that no layer made may be a buffer its owner fills again

    def map(self) -> LinearMap:
        """The map of the forward."""
        if self.sub.refreshes != self.refreshes:
            raise ModeError(
                f"the basis of {self.sub.name} was refreshed between this forward and its backward; "
                "run step() after the backward of every forward of the step"
            )
        return self.sub.map()

    def project(self, current: LinearMap, out_grad: Tensor, reduced_grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of the coordinates, and whatever a refresh wants of the gradient."""
        x = x.reshape(-1, x.shape[-1])
        reduced = current.reduce(x) if self.due else x
        projected = current.core.project(FactoredGradient(reduced_grad, reduced))
        if self.due:
            grad = FactoredGradient(out_grad, x)
            note(self.sub, grad, projected, (lambda: FactoredGradient(out_grad, x.clone())) if self.borrowed else None)
        return cast(projected, self.sub.coords.dtype)


class _Tied(torch.autograd.Function):
    """``out`` (+ x lifted(z)^T in adapter mode), with project(dY^T X) as the gradient of z."""

    @staticmethod
    @override
    def forward(ctx: Any, out: Tensor, x: Tensor, coords: Tensor, sub: Subspace, active: bool) -> Tensor:
        current = sub.map()
        given, x = x, cast(x, out.dtype)  # under autocast the layer computed in out's dtype, and so does its gradient
        reduced = _reduced(sub, current, x, given) if active or not sub.due else x
        ctx.kept = _Kept(sub, x)
        ctx.active = active
        ctx.save_for_backward(x if sub.due else reduced, coords if active else None)
        # out.detach(): returned as it is, an input would come back as a view that later in-place layers must not touch
        return out + current.inner.apply(reduced, coords) if active else out.detach()

    @staticmethod
    @once
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        current = ctx.kept.map()
        x, coords = ctx.saved_tensors
        grad = out_grad.reshape(-1, out_grad.shape[-1])
        reduced_grad = current.T.reduce(grad)
        x_grad = None
        if ctx.active and ctx.needs_input_grad[1]:
            x_grad = current.T.inner.apply(reduced_grad, coords.t()).view(*out_grad.shape[:-1], -1)
        return out_grad, x_grad, ctx.kept.project(current, grad, reduced_grad, x), None, None


class _Adapted(torch.autograd.Function):
    """x (W + S z)^T + b, with project(dY^T X) as the gradient of z and none of W."""

    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, coords: Tensor, weight: Tensor, sub: Subspace, trains: bool
    ) -> Tensor:
        current, matrix = sub.map(), sub.layout.matrix(weight)
        tokens = x.numel() // max(1, x.shape[-1])
        ctx.lifted = coords.dtype == weight.dtype and current.lifts_cheaper(tokens, sub.layout.shape)
        out = nn.functional.linear(x, _sum(current, matrix, coords) if ctx.lifted else matrix, bias)
        given, x = x, cast(x, out.dtype)  # under autocast the layer computes in another dtype, and so does its gradient
        reduced = x if ctx.lifted and (sub.due or not trains) else _reduced(sub, current, x, given)
        if not ctx.lifted:
            current.inner.add_apply_(out, reduced, coords)
        ctx.kept = _Kept(sub, x)
        ctx.save_for_backward(x if sub.due else reduced, coords, weight)
        return out

    @staticmethod
    @once
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        current, sub = ctx.kept.map(), ctx.kept.sub
        x, coords, weight = ctx.saved_tensors
        grad = out_grad.reshape(-1, out_grad.shape[-1])
        reduced_grad = current.T.reduce(grad)
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            matrix = sub.layout.matrix(weight)
            x_grad = grad @ cast(_sum(current, matrix, coords) if ctx.lifted else matrix, grad.dtype)
            if not ctx.lifted:
                current.T.inner.add_apply_(x_grad, reduced_grad, coords.t())
            x_grad = x_grad.view(*out_grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            bias_grad = grad.sum(0)
        coords_grad = ctx.kept.project(current, grad, reduced_grad, x) if ctx.needs_input_grad[2] else None
        return x_grad, bias_grad, coords_grad, None, None, None


class _Memo(NamedTuple):
    """An input that several layers share, reduced once."""

    given: weakref.ref[Tensor]
    version: int
    map: LinearMap
    reduced: Tensor
    still: set[int]  # members that have not asked for it yet

    def holds(self, sub: Subspace, current: LinearMap, x: Tensor, given: Tensor) -> bool:
        """Whether this is the very input, and the member has not had it."""
        same = self.given() is given and self.version == given._version and self.map is current
        return same and id(sub) in self.still and self.reduced.dtype == x.dtype


def _reduced(sub: Subspace, current: LinearMap, x: Tensor, given: Tensor) -> Tensor:
    """All that the map needs of x, which is ``given`` in another dtype; once for layers that share basis and input."""
    lead = sub.leader or sub
    if len(lead.members) == 1 or given.is_inference():
        return current.reduce(x)
    memo: _Memo | None = lead.memo
    if memo is None or not memo.holds(sub, current, x, given):
        others = {id(member) for member in lead.members} - {id(sub)}
        memo = _Memo(weakref.ref(given), given._version, current, current.reduce(x), others)
    memo.still.discard(id(sub))
    lead.memo = memo if memo.still else None
    return memo.reduced


def _sum(current: LinearMap, matrix: Tensor, coords: Tensor) -> Tensor:
    """W + S z as it is summed at a merge, whatever autocast would make of the product."""
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        return current.add_lift(matrix, coords)


def run(function: Any, *args: Any) -> Any:
    """Call an autograd function, outside of what is compiled."""
    return _broken(function, *args) if torch.compiler.is_dynamo_compiling() else function.apply(*args)


@uncompiled
def _broken(function: Any, *args: Any) -> Any:
    return function.apply(*args)
