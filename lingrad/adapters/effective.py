"""What another program gets that reads the weight of a layer in adapter mode: W + S z, and writing to it changes W.

Torch's fused encoder, quantization, penalties, kernels of the layer around it: all read ``layer.weight`` without calling the
layer. They get a tensor whose numbers are formed where they are asked for; what asks for its shape, dtype or device alone pays
nothing. Autograd ties it to the coordinates. Where it is written to, the coordinates are merged first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lingrad.adapters.functions import applied, once, outside_of_graph
from lingrad.errors import ModeError
from lingrad.gradients.local import DenseGradient
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import dense
from lingrad.weights.sharding import refuse_reader

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_TAKE_MEMORY = (torch.ops.aten.set_, torch.ops.aten.resize_, torch.ops.aten.resize_as_)
_GRAD_FN: Any = torch.Tensor.grad_fn
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad


class EffectiveWeight(Tensor):
    """W + S z without memory of its own: its numbers are formed where an operation asks for them.

    Attributes:
        subspace: The subspace.
        numbers: W; of a view of the sum (a transpose, a row) its numbers, formed.
        whole: Whether it is the whole weight.
        apart: Whether it is detached from the layer that it was read from.
    """

    subspace: Subspace
    numbers: Tensor
    whole: bool
    apart: bool = False
    _is_param = True  # for isinstance: to its readers it is the layer's nn.Parameter

    @staticmethod
    def __new__(cls: Any, sub: Subspace, view: Tensor | None = None) -> EffectiveWeight:
        """Make the whole weight, or a view of it from its numbers."""
        like = sub.weight.dense() if view is None else view
        # under autograd's Python key a tensor without memory; what asks for its address is told so by torch
        made: EffectiveWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.subspace, made.numbers, made.whole = sub, like, view is None
        return made

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME and isinstance(args[0], EffectiveWeight):
            return args[0].separate()
        if func.overloadpacket in _TAKE_MEMORY and isinstance(args[0], EffectiveWeight):
            refuse_other(args[0].subspace, "is given other memory")
        written = {id(one): one for one in _written(func, args, kwargs) if isinstance(one, EffectiveWeight)}
        for one in written.values():
            one.merge()

        def plain(one: EffectiveWeight) -> Tensor:
            return one.numbers if id(one) in written else one.form()

        found = func(*tree_map_only(EffectiveWeight, plain, args), **tree_map_only(EffectiveWeight, plain, kwargs))
        if len(written) == 1 and isinstance(found, Tensor):
            return next(iter(written.values()))
        if any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns):
            sub = next((one.subspace for one in args if isinstance(one, EffectiveWeight)), None)
            return found if sub is None else tree_map_only(Tensor, lambda view: EffectiveWeight(sub, view), found)
        return found

    @torch.no_grad()
    def form(self) -> Tensor:
        """The numbers, in a plain tensor that is not to be written into."""
        if self.subspace.weight.sharding is not None:
            refuse_reader(self.subspace.name)
        if not self.whole:
            return self.numbers
        self.subspace.require_intact()  # not where it is only looked at, as between the two halves of a load
        return self.subspace.add_to(self.numbers, self.subspace.coords.detach())

    @torch.no_grad()
    def merge(self) -> None:
        """Have W be the sum, for another program to write into.

        Raises:
            ModeError: This is a view, of numbers that were formed for it.
        """
        if not self.whole:
            raise ModeError(
                f"a part of {self.subspace.name} is written to, which in adapter mode is a sum, W + S z, formed for its "
                "readers. Write to the whole weight (layer.weight.copy_(changed)), or use optimizer mode"
            )
        self.subspace.open()

    @property
    def grad(self) -> Tensor | None:
        """The gradient that another program has assigned to the weight, for the next step to take."""
        return self.subspace.weight.param.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.subspace.weight.param.grad = value

    def separate(self) -> EffectiveWeight:
        """The same, apart from autograd."""
        made = EffectiveWeight(self.subspace, None if self.whole else self.numbers)
        made.apart = True
        return made

    @property
    def data(self) -> Tensor:
        """The same, apart from autograd; with memory, since another parameter may be given it as its own."""
        formed = self.form()
        made: EffectiveWeight = Tensor._make_subclass(EffectiveWeight, formed)
        made.subspace, made.numbers = self.subspace, self.numbers if self.whole else formed
        made.whole, made.apart = self.whole, True
        return made

    @data.setter
    def data(self, value: Tensor) -> None:
        if self.is_whole(value):
            return  # as after ``weight.data += change``, which has merged, and is in W
        if isinstance(value, EffectiveWeight):
            value = value.form().clone()
        self.merge()
        self.subspace.weight.param.data = value

    def is_whole(self, value: Any) -> bool:
        """Whether a value is the same weight, read once more."""
        return isinstance(value, EffectiveWeight) and value.whole and value.subspace is self.subspace

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """Autograd's; a module that is given this as a parameter of its own is refused."""
        if sys._getframe(1).f_code is nn.Module.register_parameter.__code__:
            refuse_other(self.subspace, "is put into a module as a parameter (weights are tied, pruned or parametrized)")
        return _GRAD_FN.__get__(self)

    @property
    def requires_grad(self) -> bool:
        """Whether the weight trains; to set it freezes the coordinates."""
        found: bool = _REQUIRES_GRAD.__get__(self)
        return found

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @override
    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if self.apart and requires_grad:
            refuse_other(self.subspace, "is made a parameter, or a leaf, of its own")
        if not self.apart:
            self.subspace.coords.requires_grad_(requires_grad)
        return self

    @override
    def numpy(self, *, force: bool = False) -> Any:
        return _read_only(self.form().numpy(force=force))

    @override
    def tolist(self) -> list[Any]:
        return self.form().tolist()

    @override
    def __array__(self, dtype: Any = None) -> Any:
        return _read_only(self.form().__array__(dtype))

    @override
    def __dlpack__(self, **options: Any) -> Any:
        raise ModeError(
            f"the memory of {self.subspace.name} is asked for, and in adapter mode it is a sum, W + S z, without memory of its "
            "own. Give a copy (layer.weight.detach().clone()), or use optimizer mode"
        )

    @override
    def set_(self, source: Any = None, *_: Any, **__: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__") == "torch.nn.utils.parametrize":  # before it is refused as a parameter
            refuse_other(self.subspace, "is parametrized")
        if not isinstance(source, Tensor) or _ or __:
            raise ModeError(
                f"{self.subspace.name} is given other memory, and in adapter mode it is a sum, W + S z. Write into it "
                "(layer.weight.copy_(changed)), or use optimizer mode"
            )
        self.data = source
        return self

    @override
    def register_hook(self, hook: Any) -> Any:
        raise ModeError(
            f"a hook is put on the gradient of {self.subspace.name}, which would never be called: in adapter mode it is a sum, "
            "W + S z, and its layer never forms this gradient. Leave the weight out by a rule: 'none'"
        )

    register_post_accumulate_grad_hook = register_hook

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.form().clone()

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.form().clone().__reduce_ex__(protocol)


def refuse_other(sub: Subspace, what: str) -> NoReturn:
    """Say that what another program does with the sum cannot be had.

    Args:
        sub: The subspace.
        what: What it does, after the weight's name.

    Raises:
        ModeError: Always.
    """
    raise ModeError(
        f"{sub.name} {what}, and in adapter mode it is a sum, W + S z, formed for its readers. Give it a copy, "
        "nn.Parameter(layer.weight.detach().clone()); to change the layer itself call detach(), and lingrad again after it"
    )


def _read_only(array: Any) -> Any:
    """An array of numbers that were formed for it: what is written there would reach no weight."""
    array.flags.writeable = False
    return array


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes into, those in lists one by one."""
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | dict(kwargs)
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given:
            value = given[argument.name]
            yield from value if isinstance(value, list | tuple) else [value]


class _Read(torch.autograd.Function):
    """W + S z, with project(dW) as the gradient of z."""

    @staticmethod
    @override
    def forward(ctx: Any, coords: Tensor, sub: Subspace, averages: bool, formed: bool) -> Tensor:
        ctx.sub, ctx.averages = sub, averages
        if not formed:
            return EffectiveWeight(sub)
        sub.require_intact()
        return sub.add_to(sub.weight.dense(), coords)

    @staticmethod
    @once
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix = DenseGradient(ctx.sub.weight.layout.matrix(dense(grad)))
        # autograd may use its buffer again; a sum writes into ours
        projected = ctx.sub.project(matrix, lambda: DenseGradient(matrix.dense().clone()))
        return ctx.sub.processes.average(projected) if ctx.averages else projected, None, None, None


def read(sub: Subspace, *, averages: bool) -> Tensor:
    """The weight as other programs see it in adapter mode.

    Args:
        sub: Its subspace.
        averages: Whether the gradient that reaches the coordinates so is averaged over ranks here.

    Returns:
        An `EffectiveWeight`, tied to the coordinates where gradients are recorded; in what is compiled, a plain tensor.
    """
    compiling = torch.compiler.is_compiling()  # or exporting
    if compiling or (torch.is_grad_enabled() and sub.coords.requires_grad):
        given = _Read, sub.coords, sub, averages, compiling
        tied: Tensor = outside_of_graph(applied, *given) if compiling else applied(*given)
        return tied
    return EffectiveWeight(sub)
