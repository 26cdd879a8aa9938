"""Linear layers: the forward is replaced, on the instance, so that the weight gradient is computed in the small space.

In optimizer mode the plain forward runs as it is, its weight apart from autograd, so that its output is the plain layer's to
the bit, and is then tied to the coordinates. In adapter mode the layer acts as W + S z; where another program had replaced its
forward, or its weight is quantised, S z is added to what that forward gives. The functions are in `lingrad.adapters.projected`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad import parallel
from lingrad.adapters.base import CHILD, Attachment, Coords, refuse_hooks
from lingrad.adapters.projected import Adapted, Projection, SharedInput, Tied, run
from lingrad.adapters.reading import make_plain, make_readable, read
from lingrad.config.settings import Mode
from lingrad.errors import ModeError
from lingrad.subspaces.subspace import Subspace, call
from lingrad.subspaces.watched import watch
from lingrad.weights.packed import PackedWeight


class LayerAttachment(Attachment):
    """The forward of one linear layer replaced, in both modes.

    Args:
        sub: The subspace of the layer's weight.
        module: The layer; its ``forward`` maps x [..., n] to x W^T + b [..., m] and uses the weight in no other way.
        attribute: The weight's name in the layer.
        shared: The input that it may share with other layers on its basis; None where it has that for itself.
        plain: See `Attachment`.
    """

    def __init__(
        self, sub: Subspace, module: nn.Module, attribute: str, shared: SharedInput | None, *, plain: bool = False
    ) -> None:
        super().__init__(sub, plain=plain)
        self.module = module
        self.attribute = attribute
        self.layer = Projection(sub, shared)
        self.holder = Coords(sub, active=False)
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
    def overridden(self) -> bool:
        return vars(self.module).get("forward") != self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._act(self, *args, **kwargs)

    # torch.compile breaks its graph in every function between `_forward` and an autograd function, so there is one only
    def _adapted(self, *args: Any, **kwargs: Any) -> Tensor:
        """The previous forward with S z added."""
        x = args[0] if args else next(iter(kwargs.values()))
        acted: Tensor = run(Tied, self._previous(*args, **kwargs), x, self.sub.coords, self.layer, True)
        return acted

    def _previous(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = self._original or partial(type(self.module).forward, self.module)
        out: Tensor = forward(*args, **kwargs)
        return out


@final
class LinearAttachment(LayerAttachment):
    """A linear layer with a dense weight; arguments as for `LayerAttachment`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handle: Any = None  # of the hook that takes gradients of whoever reads the weight, in optimizer mode
        self._runs = False  # whether the forward that was found is running, which reads the weight as it is

    def __getstate__(self) -> dict[str, Any]:
        """Without the hook, which is the original's: a copy is for evaluation."""
        return {**vars(self), "_handle": None}

    @override
    def require(self, mode: Mode) -> None:
        own = 0 if self._handle is None else 1
        refuse_hooks(self.sub.name, self.sub.weight.param, "its layer never forms this gradient", own)

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
        return self._frozen() if self._runs else read(self.sub, averages=False)

    def _replaced(self) -> None:
        """Take another parameter for the whole weight: whoever puts it there has read the sum."""
        self.sub.restart()
        watch(self.sub.weight.param, self.sub.open)

    @override
    def _previous(self, *args: Any, **kwargs: Any) -> Tensor:
        module, weight = self.module, self._held()
        if self._original is None and type(module).forward is nn.Linear.forward and len(args) == 1 and not kwargs:
            return nn.functional.linear(args[0], weight.detach(), module.bias)  # type: ignore[arg-type]
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
        """The previous forward, tied to the coordinates, which are zero unless another program has written to them."""
        weight, coords = self._held(), self.sub.coords
        active = not self.sub.released
        out = self._previous(*args, **kwargs)
        if not active and not (torch.is_grad_enabled() and coords.requires_grad and weight.requires_grad):
            return out
        x = args[0] if args else next(iter(kwargs.values()))
        tied: Tensor = run(Tied, out, x, coords, self.layer, active)
        return tied

    @override
    def _adapted(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, coords = self._frozen(), self.sub.coords
        if self._original is not None:
            return super()._adapted(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        bias, trains = self.module._parameters.get("bias"), torch.is_grad_enabled() and coords.requires_grad
        acted: Tensor = run(Adapted, x, bias, coords, weight, self.layer, trains)
        return acted

    def _held(self) -> nn.Parameter:
        """The weight, in the shape that it was given with."""
        weight = self.module._parameters.get(self.attribute)
        if weight is None:
            raise ModeError(
                f"{self.sub.name} was parametrized (weight_norm and the like) after it was wrapped, and its updates would be "
                "lost; parametrize first, then call lingrad"
            )
        self.sub.require_intact()
        return weight

    def _frozen(self) -> nn.Parameter:
        """The weight, frozen still."""
        weight = self._held()
        if weight.requires_grad:  # model.requires_grad_(True) means the coordinates, which it reaches too
            weight.requires_grad_(False)
        return weight


@final
class PackedAttachment(LayerAttachment):
    """A linear layer with a weight in 4 or 8 bits, in adapter mode: its own forward runs, and S z is added.

    Args:
        sub: The subspace of the layer's weight.
        weight: The weight.
        shared: See `LayerAttachment`.
        plain: See `Attachment`; the plain model then has W + S z quantised, which loses what a merge would.
    """

    def __init__(self, sub: Subspace, weight: PackedWeight, shared: SharedInput | None, *, plain: bool = False) -> None:
        super().__init__(sub, weight.module, "weight", shared, plain=plain)
        self.packed = weight
        self._opened: Any = None

    @override
    def require(self, mode: Mode) -> None:
        if mode == "optimizer":
            raise ModeError(
                f"{self.sub.name} is stored as {self.packed.kind}, and optimizer mode merges at every step: each would "
                "quantise the weight again and lose every update smaller than half a step of its grid. Use lingrad.adapt, "
                "which merges at refreshes, or leave the weight out by a rule: 'none'"
            )

    @override
    def _hook(self, mode: Mode) -> None:
        self._hooks.append(self.module.register_load_state_dict_pre_hook(partial(self._take)))
        if self.plain:
            self._hooks.append(self.module.register_state_dict_post_hook(partial(self._put)))

    @override
    def _connect(self, mode: Mode) -> None:
        self.require(mode)
        self._opened = self.packed.open()
        super()._connect(mode)

    @override
    def _disconnect(self) -> None:
        super()._disconnect()
        self.packed.close(self._opened)

    @torch.no_grad()
    def _put(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Put W + S z, quantised, in the place of W in a state_dict that was made."""
        if bool(self.sub.coords.any()):
            entries = self.packed.entries(self.sub.effective(torch.float32))
            state.update({f"{prefix}{key}": value for key, value in entries.items()})

    @torch.no_grad()
    def _take(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take the scales of a state_dict that is about to be loaded: bitsandbytes cannot, where a layer is quantised."""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for key in self.packed.take(own):
            state.pop(f"{prefix}{key}", None)
        if self.plain and "weight" in own:
            self.sub.coords.data.zero_()
