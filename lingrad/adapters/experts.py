"""What a layer of fused experts reads as its weight: products with it have a projected gradient.

transformers multiplies experts one by one, ``linear(x, weight[e])``, in one grouped product over rows that are sorted by
expert, or in a batched one with as many rows for each. These are known here; whatever else is done with the weight, such as a
gather of one matrix for each token, is done with the plain weight, whose gradient is formed and projected.
"""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lingrad.adapters.effective import EffectiveWeight, read
from lingrad.adapters.functions import applied, once
from lingrad.adapters.grouped import ExpertProduct, Tokens, Use
from lingrad.adapters.hooks import is_hooked
from lingrad.adapters.products import FACTS, KNOWN
from lingrad.gradients import DenseGradient, Gradient, RowsGradient
from lingrad.maps.stacked import BatchedMap
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import call, dense


def fuses_experts(sub: Subspace) -> bool:
    """Whether a weight is that of fused experts, one under the other in its first dimension, whose products are known.

    Args:
        sub: Its subspace.

    Returns:
        Whether it is. A weight of two dimensions is a matrix, which a model may read in any way.
    """
    return sub.weight.param.dim() == 3 and isinstance(sub.map(), BatchedMap)


class ExpertsPart(NamedTuple):
    """What of a weight [count, m, n] a tensor is.

    Args:
        expert: Which expert's matrix; None for all.
        turned: Whether its last two dimensions are swapped.
    """

    expert: int | None
    turned: bool

    def of(self, weight: Tensor) -> Tensor:
        """This part of a weight, a view."""
        found = weight if self.expert is None else weight[self.expert]
        return found.mT if self.turned else found.view_as(found)


ALL = ExpertsPart(None, turned=False)


class ExpertsReader:
    """Gives a layer its weight.

    Args:
        sub: The subspace.
        adapter: Whether the weight is that of adapter mode, W + S z.
    """

    def __init__(self, sub: Subspace, *, adapter: bool) -> None:
        self.sub = sub
        self.adapter = adapter
        self._tokens: tuple[tuple[Any, ...], tuple[Tensor, ...]] = ((), ())

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors of a running forward."""
        return {**vars(self), "_tokens": ((), ())}

    def plain(self) -> Tensor:
        """The weight as everybody else sees it: its gradient is formed, and projected."""
        return read(self.sub, averages=True) if self.adapter else self.sub.weight.param

    def read(self) -> Tensor:
        """The weight [count, m, n]."""
        sub, param = self.sub, self.sub.weight.param
        usable = torch.is_grad_enabled() and sub.coords.requires_grad and not _is_transformed()
        if not usable or not (self.adapter or (param.requires_grad and not is_hooked(param))):
            return self.plain()
        sub.require_intact()
        return self.give(ALL)

    def give(self, part: ExpertsPart) -> Tensor:
        """The weight or a part of it, tied to the coordinates for whoever does not ask `__torch_function__` too."""
        if self.adapter:
            tied: Tensor = applied(_ReadPart, self.sub.coords, self, part)
            return tied
        made: Any = part.of(self.sub.weight.param).as_subclass(ExpertsWeight)
        made.reader, made.part = self, part
        found: Tensor = made
        return found

    def tie(self, out: Tensor, x: Tensor, use: Use) -> Tensor:
        """A product with W tied to the coordinates, which are added to it where they are not zero."""
        sub = self.sub
        trains = torch.is_grad_enabled() and sub.coords.requires_grad
        if sub.released and not trains:
            return out
        token = sub.coords if use.expert is None or not trains else self._token(use.expert)
        tied: Tensor = applied(ExpertProduct, out, x, token, use, not sub.released)
        return tied

    def _token(self, expert: int) -> Tensor:
        """What stands for one expert's coordinates, the same until a backward, which so puts their gradient together once."""
        coords = self.sub.coords
        key = (coords.device, coords.dtype, id(coords))
        if self._tokens[0] != key:
            forget = partial(call, weakref.WeakMethod(self._forget))
            self._tokens = key, applied(Tokens, coords, self.sub, forget)
        return self._tokens[1][expert]

    def _forget(self) -> None:
        self._tokens = (), ()


class Asked:
    """Known products of the weight are tied to the coordinates; whatever else is done is done with the plain weight."""

    reader: ExpertsReader
    part: ExpertsPart = ALL

    @property
    def frozen(self) -> Tensor:
        """W, apart from autograd."""
        return self.part.of(self.reader.sub.weight.param.detach())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in FACTS:
                return func(*args, **kwargs)
            if _is_transformed():  # by itself it is tied as well
                return func(*args, **kwargs)
            known = KNOWN.get(func)
            if known is not None and not kwargs.keys() - known.options and len(args) <= known.most:
                found = known.act(func, *args, **kwargs)
                if found is not NotImplemented:
                    return found
            return func(*tree_map_only(Asked, _plain, args), **tree_map_only(Asked, _plain, kwargs))


@final
class ExpertsWeight(Asked, Tensor):
    """W, or a part of it, in optimizer mode."""

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(_plain(self) if self.part == ALL else _plain(self).detach().clone(), memo)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_plain(self) if self.part == ALL else _plain(self).detach()).__reduce_ex__(protocol)


@final
class ExpertsSum(Asked, EffectiveWeight):
    """W + S z, or a part of it, in adapter mode: its numbers are formed where an operation that is not known asks for them."""

    @staticmethod
    def __new__(cls: Any, reader: ExpertsReader, part: ExpertsPart) -> ExpertsSum:
        """Make one."""
        view = None if part == ALL else part.of(reader.sub.weight.param.detach())
        made: Any = EffectiveWeight.__new__(cls, reader.sub, view)
        made.reader, made.part = reader, part
        made._is_param = part == ALL
        found: ExpertsSum = made
        return found

    @override
    def separate(self) -> ExpertsSum:
        made = ExpertsSum(self.reader, self.part)
        made.apart = True
        return made

    @override
    @torch.no_grad()
    def form(self) -> Tensor:
        if self.part == ALL:
            return super().form()
        sub, expert = self.reader.sub, self.part.expert
        if expert is None:
            return self.part.of(sub.add_to(sub.weight.dense(), sub.coords.detach()))
        current = sub.map()
        assert isinstance(current, BatchedMap)  # noqa: S101 - else there is none of these
        one, rows = current.each(expert), sub.coords.shape[0] // current.count
        lifted = one.lift(sub.coords.detach()[expert * rows : (expert + 1) * rows])
        plain = sub.weight.param.detach()[expert]
        return self.part._replace(expert=None).of(plain + lifted.to(plain.dtype))


class _ReadPart(torch.autograd.Function):
    """W + S z or a part of it, with the projected gradient of that as the gradient of z."""

    @staticmethod
    @override
    def forward(ctx: Any, coords: Tensor, reader: ExpertsReader, part: ExpertsPart) -> Tensor:
        ctx.reader, ctx.part = reader, part
        return ExpertsSum(reader, part)

    @staticmethod
    @once
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sub, part = ctx.reader.sub, ctx.part
        grad = dense(grad.mT if part.turned else grad)
        seen: Gradient = DenseGradient(grad.reshape(-1, grad.shape[-1]).clone())  # autograd may use its buffer again
        if part.expert is not None:
            seen = RowsGradient(seen, part.expert * seen.shape[0], sub.basis.shape[0])
        return sub.processes.average(sub.project(seen)), None, None


def _is_transformed() -> bool:
    """Whether functions are transformed or traced now, by programs that must see plain tensors."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or fake is not None


def _plain(weight: Any) -> Tensor:
    """The weight, or the part of it that was asked for, tied to the coordinates in its own way."""
    found: Tensor = weight.reader.plain()
    part: ExpertsPart = weight.part
    return found if part == ALL else part.of(found)
