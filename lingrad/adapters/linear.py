"""Linear layers: the forward is replaced, on the instance, so that the weight gradient is computed in the small space.

The layer is one autograd function in both modes; in optimizer mode its output is the plain layer's to the bit, in adapter mode
it acts as W + S z. Where another program had replaced its forward, or its weight is quantised, that forward runs, and what it
gives is tied to the coordinates. The functions are in `lingrad.adapters.projected`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from typing_extensions import override

from lingrad import parallel
from lingrad.adapters.base import CHILD, Attachment, Coords
from lingrad.adapters.effective import read
from lingrad.adapters.functions import outside_of_graph, run
from lingrad.adapters.hooks import refuse_hooks
from lingrad.adapters.projected import Projected, Projection, Tied, Way
from lingrad.adapters.reading import make_plain, make_readable
from lingrad.config.settings import Mode
from lingrad.errors import ModeError
from lingrad.subspaces.watched import is_touched, watch
from lingrad.tensors import call
from lingrad.weights.sharding import refuse_late


class LayerAttachment(Attachment):
    """The forward of one linear layer replaced, in both modes.

    Args:
        module: The layer; its ``forward`` maps x [..., n] to x W^T + b [..., m] and uses the weight in no other way.
        attribute: The weight's name in the layer.
        layer: What its autograd functions need besides tensors.
        plain: See `Attachment`.
    """

    def __init__(self, module: nn.Module, attribute: str, layer: Projection, *, plain: bool = False) -> None:
        super().__init__(layer.sub, plain=plain)
        self.module = module
        self.attribute = attribute
        self.layer = layer
        self.holder = Coords(layer.sub, active=False)
        # what the forward does, the previous one while detached; of the class: a bound method would keep its object alive
        self._act: Callable[..., Tensor] = type(self)._previous
        self._original: Any = None  # another program's forward that this one replaces; None for the class's own
        self._covered = False  # whether another program has replaced this forward, and may call it

    @override
    def _connect(self, mode: Mode) -> None:
        self.holder.active = mode == "adapter" and not self.plain
        self.module.add_module(CHILD, self.holder)
        there = vars(self.module).get("forward")
        if not self._covered or there is None:
            self._original = there
            vars(self.module)["forward"] = self._forward
        self._act = type(self)._adapted

    @override
    def _keys(self) -> list[tuple[nn.Module, str, str]]:
        return [(self.module, self.attribute, self.attribute)]

    @override
    def _disconnect(self) -> None:
        self._act = type(self)._previous
        self._covered = self.overridden  # the later forward may still call this one
        if not self._covered:
            del vars(self.module)["forward"]
            if self._original is not None:
                vars(self.module)["forward"] = self._original
        self.module._modules.pop(CHILD, None)

    @override
    def holds(self, param: Tensor) -> bool:
        return param is self.sub.weight.param  # looked up in every forward, so another parameter in its place is followed

    @override
    def forget(self) -> None:
        self.sub.forget()
        if self.layer.shared is not None:
            self.layer.shared.forget()

    @property
    @override
    def shares(self) -> bool:
        return self.layer.shared is not None

    @override
    def prepare(self) -> None:
        self.layer.prepare()

    @override
    def require_read(self) -> None:
        self.layer.require_read()

    @property
    @override
    def overridden(self) -> bool:
        return vars(self.module).get("forward") != self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            if not self._traceable():
                return outside_of_graph(self._act, self, *args, **kwargs)  # type: ignore[no-any-return]
            self.layer.trace()
        return self._act(self, *args, **kwargs)

    def _traceable(self) -> bool:
        """Whether torch.compile can go through the layer."""
        return self.layer.traceable

    def _adapted(self, *args: Any, **kwargs: Any) -> Tensor:
        """The previous forward with S z added."""
        return self._tie(self._previous(*args, **kwargs), _first(args, kwargs), active=True)

    def _tie(self, out: Tensor, x: Tensor, *, active: bool) -> Tensor:
        tied: Tensor = run(Tied, out, x, self.sub.coords, self.layer, active, *self.layer.leaves())
        return tied

    def _previous(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = self._original or partial(type(self.module).forward, self.module)
        out: Tensor = forward(*args, **kwargs)
        return out


class LinearAttachment(LayerAttachment):
    """A linear layer with a dense weight; arguments as for `LayerAttachment`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handle: Any = None  # of the hook that takes gradients of whoever reads the weight, in optimizer mode
        self._shape = self.sub.weight.layout.weight_shape
        self._copied = False
        self._runs = False  # whether the forward that was found is running, which reads the weight as it is

    def __getstate__(self) -> dict[str, Any]:
        """Without the hook, which is the original's: a copy is for evaluation."""
        return {**vars(self), "_handle": None, "_copied": True}

    @override
    def require(self, mode: Mode) -> None:
        self.require_heard(self.sub.weight.param)

    @override
    def require_heard(self, weight: Any) -> None:
        if weight._backward_hooks or len(weight._post_accumulate_grad_hooks or ()) > (self._handle is not None):
            refuse_hooks(self.sub.name, weight, "its layer never forms this gradient")

    @override
    def _connect(self, mode: Mode) -> None:
        weight = self.sub.weight.param
        trains = weight.requires_grad
        self.sub.coords.requires_grad_(trains)
        super()._connect(mode)
        if mode == "optimizer":
            self._act = type(self)._tied
            capture = weakref.WeakMethod(self._capture)  # a cycle through a tensor's hooks would never be freed
            self._handle = weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(call, capture))
            weight.requires_grad_(trains)
        else:
            weight.requires_grad_(False)
            make_readable(self.module, self.attribute, self._read, self._replaced)

    @override
    def _disconnect(self) -> None:
        super()._disconnect()
        weight, trains = self.sub.weight.param, self.sub.coords.requires_grad
        if self._handle is None:
            make_plain(self.module, self.attribute)
        else:
            self._handle.remove()
            self._handle, trains = None, trains and weight.requires_grad
        weight.requires_grad_(trains)

    def _capture(self, weight: Tensor) -> None:
        """Take the gradient of whoever reads the weight without calling its layer."""
        if parallel.initialized():  # after DistributedDataParallel has put its averages in place, at the end of the backward
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(partial(self.sub.take, weight)))
        else:
            self.sub.take(weight)

    def _read(self) -> Tensor:
        """The weight, for whoever reads it in adapter mode."""
        if _by_fsdp():
            if self.layer.sharding is None:
                refuse_late(self.sub.name)
            return self._frozen()
        return self._frozen() if self._runs else read(self.sub, averages=False)

    def _replaced(self) -> None:
        """Take another parameter for the whole weight: whoever puts it there has read the sum."""
        if self.layer.sharding is not None:  # fully_shard gathers it, and puts the shard back
            return
        self.sub.restart()
        watch(self.sub.weight.param, self.sub.open)

    @override
    def _traceable(self) -> bool:
        # the forward of another program runs with its weight frozen, which a compiled one cannot be for a while
        return self.layer.traceable and (self._original is None or self._handle is None)

    @override
    def _previous(self, *args: Any, **kwargs: Any) -> Tensor:
        weight = self._held()
        if self._original is None and len(args) == 1 and not kwargs:
            matrix = self.sub.weight.layout.matrix(weight.detach())
            return nn.functional.linear(args[0], matrix, self.module._parameters.get("bias"))
        trains, self._runs = weight.requires_grad, True
        if trains:
            weight.requires_grad_(False)
        try:
            return super()._previous(*args, **kwargs)
        finally:
            self._runs = False
            if trains:
                weight.requires_grad_(True)

    def _tied(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain layer, tied to the coordinates, which are zero unless another program has written to them."""
        weight, coords = self._held(), self.sub.coords
        active = not self.sub.released
        if not active and not (torch.is_grad_enabled() and coords.requires_grad and weight.requires_grad):
            return self._previous(*args, **kwargs)
        x = _first(args, kwargs)
        if active or self._original is not None:
            return self._tie(self._previous(*args, **kwargs), x, active=active)
        return self._project(x, weight.detach(), None, True)

    @override
    def _adapted(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, coords = self._frozen(), self.sub.coords
        if self._original is not None:
            return super()._adapted(*args, **kwargs)
        x, shape = _first(args, kwargs), self.sub.weight.layout.shape
        tokens = x.numel() // max(1, shape[1])
        current = self.sub.basis.map()  # kept until the layer has run, so that a basis in host memory is copied once
        forms = coords.dtype == weight.dtype and current.lifts_cheaper(tokens, shape)
        trains = torch.is_grad_enabled() and coords.requires_grad
        return self._project(x, weight, "sum" if forms else "apply", trains)

    def _project(self, x: Tensor, weight: Tensor, way: Way, trains: bool) -> Tensor:
        bias, matrix = self.module._parameters.get("bias"), self.sub.weight.layout.matrix(weight)
        out: Tensor = run(Projected, x, bias, self.sub.coords, matrix, self.layer, way, trains, *self.layer.leaves())
        return out

    def _held(self) -> nn.Parameter:
        """The weight, in the shape that it was given with."""
        weight = self.module._parameters.get(self.attribute)
        if weight is None:
            raise ModeError(
                f"{self.sub.name} was parametrized (weight_norm and the like) after it was wrapped, and its updates would be "
                "lost; parametrize first, then call lingrad"
            )
        # a compiled run finds in its step what was written into
        if weight.shape != self._shape or (not is_dynamo_compiling() and is_touched(weight)):
            self.sub.require_intact()
        return weight

    def _frozen(self) -> nn.Parameter:
        """The weight, frozen still."""
        weight = self._held()
        if type(weight) is nn.Parameter and not self._copied:  # put there past the module, as by register_parameter
            self._replaced()
        if weight.requires_grad:  # model.requires_grad_(True) means the coordinates, which it reaches too
            weight.requires_grad_(False)
        return weight


def _by_fsdp() -> bool:
    """Whether it is fully_shard that reads an attribute of the module, two calls up."""
    name: str = sys._getframe(3).f_globals.get("__name__", "")
    return name.startswith("torch.distributed.fsdp.")


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
