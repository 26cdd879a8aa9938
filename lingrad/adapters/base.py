"""What every attachment offers, and the module that holds coordinates inside a model."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.config.settings import Mode
from lingrad.errors import ModeError
from lingrad.subspaces.subspace import Subspace
from lingrad.subspaces.watched import unwatch, was_written, watch
from lingrad.tensors import is_sharded, is_zero, own, same_memory, wide

CHILD = "lingrad"  # the name under which a layer holds its coordinates
_MARK = "_lingrad_attached"  # on a parameter whose gradient belongs to a subspace


class Attachment(ABC):
    """The route between one subspace and the autograd graph of a model.

    Args:
        sub: The subspace.
        plain: Whether the model's state_dict is that of the plain model, W + S z, in adapter mode too.
    """

    averages: ClassVar[bool] = False  # whether coords.grad is averaged over ranks here, not by DistributedDataParallel
    marked: int = 0  # the id of the parameter that was attached

    def __init__(self, sub: Subspace, *, plain: bool = False) -> None:
        self.sub, self.plain = sub, plain
        self._hooks: list[Any] = []
        # the sum that a state_dict has, and that state_dict: tied weights are in it more than once
        self._last: tuple[weakref.ref[Tensor], weakref.ref[dict[str, Any]]] | None = None

    @property
    def overridden(self) -> bool:
        """Whether another program has replaced what was attached; its replacement may or may not call it."""
        return False

    @property
    def shares(self) -> bool:
        """Whether a forward may leave something for other layers."""
        return False

    def require(self, mode: Mode) -> None:  # noqa: B027 - most support both
        """Make sure, before anything is changed, that a mode is supported.

        Args:
            mode: ``optimizer`` or ``adapter``. Raises `ModeError` where it is not.
        """

    def attach(self, mode: Mode) -> None:
        """Connect in a mode. In optimizer mode the coordinates are zero; the forward is the plain layer's.

        Args:
            mode: ``optimizer`` or ``adapter``. Raises `ModeError`, with nothing changed, where it is not supported.
        """
        self._connect(mode)
        self._hook(mode)
        weight = self.sub.weight.param
        self.marked = vars(weight)[_MARK] = id(weight)  # a saved copy keeps it, and is another object
        if mode == "adapter":
            watch(weight, self.sub.open)

    def detach(self) -> None:
        """Disconnect and leave the model's structure as it was found; weights and coordinates are not touched."""
        self._disconnect()  # first: where that fails, the weight stays attached
        weight = self.sub.weight.param
        unwatch(weight)
        vars(weight).pop(_MARK, None)  # there is none where another program has replaced the parameter
        while self._hooks:
            self._hooks.pop().remove()

    def holds(self, param: Tensor) -> bool:
        """Whether gradients of this parameter, found in the model, reach the coordinates."""
        return is_attached(param)

    def leave_gradient(self) -> None:  # noqa: B027 - only a hook on a parameter takes one there
        """In optimizer mode, leave gradients in ``weight.grad`` for other code to read and change; the step takes them."""

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Look ahead to the next step, of which the basis has been told."""

    def require_read(self) -> None:  # noqa: B027 - most need nothing
        """Make sure that the backwards of a step with a refresh have left what it reads.

        Raises:
            ModeError: They have not.
        """

    def require_heard(self, weight: Tensor) -> None:  # noqa: B027 - most form the gradient
        """Make sure, before a step, that no hook of another program waits for a gradient that is never formed.

        Args:
            weight: The parameter.

        Raises:
            ModeError: One does.
        """

    def forget(self) -> None:
        """Drop what backwards and forwards have left for others of the same step."""
        self.sub.forget()

    def _hook(self, mode: Mode) -> None:
        """Have the model's state_dict be the plain model's, where that is asked for."""
        if self.plain and mode == "adapter":
            for module, attribute, key in self._keys():
                save, load = (partial(hook, attribute=attribute, key=key) for hook in (self._save, self._load))
                self._hooks.append(module.register_state_dict_post_hook(save))
                self._hooks.append(module.register_load_state_dict_pre_hook(load))
                self._hooks.append(module.register_load_state_dict_post_hook(self._loaded))

    @abstractmethod
    def _keys(self) -> list[tuple[nn.Module, str, str]]:
        """In adapter mode, the modules that hold the weight, its name there, and its key in their state_dict."""

    def _save(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any, *, attribute: str, key: str) -> None:
        """Put W + S z in the place of W, in a state_dict that was made."""
        weight = state[f"{prefix}{key}"] if key == attribute else state.pop(f"{prefix}{key}")
        # only within one call: fused optimizers step coordinates without raising their version
        known = None if self._last is None or self._last[1]() is not state else self._last[0]()
        if known is None:
            known = self.sub.effective()
            # the state of the optimizer has W itself: what loads both in place must not find one memory. Of the sums all at
            # once may be more than a device has left
            known = known.clone() if known.data_ptr() == weight.data_ptr() else known.cpu()
            self._last = weakref.ref(known), weakref.ref(state)
        state[f"{prefix}{attribute}"] = known

    def _load(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: Any, attribute: str, key: str
    ) -> None:
        """Take the weight of a plain model."""
        if f"{prefix}{attribute}" in state:
            weight, given = self.sub.weight.param, state.pop(f"{prefix}{attribute}")
            if not isinstance(given, Tensor) or given.shape != weight.shape:
                state[f"{prefix}{key}"] = given  # torch refuses it, and the run is as it was
                return
            # the sum: as where the optimizer's state, which has both parts, was loaded before; W itself: torch fills in so what
            # a partial state leaves out. A parameter that is assigned is the whole weight
            if not metadata.get("assign_to_params_buffers", False) and self._is_known(given):
                unwatch(weight)  # it is written over with itself
                state[f"{prefix}{key}"] = weight.detach()
                return
            state[f"{prefix}{key}"] = given
            if self.sub.weight.sharding is None:  # an optimizer's state that is loaded after this may have the memory
                weight.data = weight.detach().clone()
            self.sub.restart()

    def _loaded(self, module: nn.Module, _: Any) -> None:
        watch(self.sub.weight.param, self.sub.open)

    @torch.no_grad()
    def _is_known(self, given: Tensor) -> bool:
        """Whether what is loaded is W itself, or W + S z as it is now, to the bit; in every process."""
        weight = self.sub.weight.param
        written = was_written(weight)  # asked first: what is loaded takes the place of a sum that is none
        now = self.sub.effective()
        alike = given.dtype == now.dtype and is_sharded(given) == is_sharded(now)
        same = alike and torch.equal(own(given).to(now.device), own(now))
        itself = alike and same_memory(given, weight) and not written
        found = torch.tensor([same, itself], dtype=torch.float32, device=now.device)
        return bool((found if self.sub.weight.sharding is None else self.sub.processes.average(found)).max() == 1)

    @abstractmethod
    def _connect(self, mode: Mode) -> None: ...

    @abstractmethod
    def _disconnect(self) -> None: ...


class Coords(nn.Module):
    """Coordinates as a module, so that a model's parameters include them.

    In optimizer mode it is absent from ``state_dict``, which stays the plain model's; in adapter mode the coordinates are
    part of the model's weights and are saved with them. It follows the model to a device; in dtype it stays at least float32.

    Args:
        sub: The subspace whose coordinates it holds.
        active: Whether the coordinates take part in the forward, as in adapter mode.
    """

    def __init__(self, sub: Subspace, *, active: bool) -> None:
        super().__init__()
        self.coords = sub.coords
        self.sub = sub
        self.active = active

    @override
    def extra_repr(self) -> str:
        return f"{self.sub.basis.transform}, coords={tuple(self.coords.shape)}, active={self.active}"

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Coords:
        if self.sub.weight.sharding is not None:
            return self._apply_sharded(fn)
        asked = fn(self.coords.detach()[:0])
        if asked.is_meta:
            raise ModeError(
                f"{self.sub.name} is being trained, and a move to the meta device would throw away its basis and coordinates; "
                "call detach() first"
            )
        super()._apply(lambda t: t.to(device=asked.device, dtype=wide(asked.dtype)), recurse)  # type: ignore[no-untyped-call]
        self.sub.basis.move(asked.device)
        return self

    def _apply_sharded(self, fn: Callable[[Tensor], Tensor]) -> Coords:
        """Refuse moves, and casts of the weight, of which fully_shard makes other parameters."""
        before = own(self.coords).new_empty(0, dtype=self.sub.weight.dtype)
        if ((after := fn(before)).device, after.dtype) != (before.device, before.dtype):
            raise ModeError(
                f"{self.sub.name} is sharded and being trained: move and cast the model before fully_shard and lingrad"
            )
        return self

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.active:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    @override
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        was_written(self.sub.weight.param)  # the coordinates that are loaded now belong to it
        if self.active:
            in_place = {**local_metadata, "assign_to_params_buffers": False}  # other coordinates would not be the run's
            super()._load_from_state_dict(state_dict, prefix, in_place, strict, missing_keys, unexpected_keys, error_msgs)
            if strict and f"{prefix}coords" not in state_dict:
                error_msgs.append(
                    f"there is no {prefix}coords: the file is of a plain model, or was saved in optimizer mode; "
                    "call opt.switch('optimizer') before loading it"
                )
        elif f"{prefix}coords" in state_dict and not self.sub.released:  # saved by a run without self_contained
            self._load_coords(state_dict[f"{prefix}coords"], f"{prefix}coords", error_msgs)
        elif f"{prefix}coords" in state_dict and not is_zero(state_dict[f"{prefix}coords"], self.coords.shape):
            error_msgs.append(
                f"{prefix}coords was saved in adapter mode, but the state of this model holds no coordinates: it is in "
                "optimizer mode; call opt.switch('adapter') before loading it"
            )

    @torch.no_grad()
    def _load_coords(self, given: Any, key: str, error_msgs: list[str]) -> None:
        if isinstance(given, Tensor) and given.shape == self.coords.shape:
            self.coords.copy_(given)
        else:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            error_msgs.append(f"{key} is {shape} in the file; expected {tuple(self.coords.shape)}")


def is_attached(param: Tensor) -> bool:
    """Whether a parameter belongs to a subspace."""
    return getattr(param, _MARK, None) == id(param)


def refuse_attached(name: str, param: nn.Parameter, module: nn.Module | None = None) -> None:
    """Make sure that a parameter belongs to no subspace yet.

    Args:
        name: Its name.
        param: The parameter.
        module: The module that owns it, if known.

    Raises:
        ModeError: It does.
    """
    # a copy of a model keeps modules and hooks, not attributes of parameters
    if is_attached(param):
        raise ModeError(f"'{name}' is wrapped already; call detach() on the optimizer that has it, or build the model again")
    children = getattr(module, "_modules", {}).values()
    *_, owner, last = ["", *name.split(".")]
    is_coords = last == "coords" and owner.partition("_")[0] == CHILD  # all that is known of a bare parameter is its name
    if is_coords or hasattr(param, _MARK) or isinstance(module, Coords) or any(isinstance(child, Coords) for child in children):
        raise ModeError(
            f"'{name}' is in a copy of a wrapped model, which is good for evaluation only; copy the model after detach(), "
            "or load state_dict() of the wrapped one in optimizer mode into a new model"
        )
