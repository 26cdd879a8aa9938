"""What every attachment offers, and the module that holds coordinates inside a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lingrad._typing import override
from lingrad.errors import ModeError
from lingrad.gradient import wide
from lingrad.subspace import Subspace

Mode = Literal["optimizer", "adapter"]

CHILD = "lingrad"  # the name under which a layer holds its coordinates
_MARK = "_lingrad_attached"  # on a parameter whose gradient belongs to a subspace


class Attachment(ABC):
    """The connection between one subspace and the autograd graph of a model.

    Args:
        sub: The subspace.
    """

    averages: ClassVar[bool] = False  # whether coords.grad is averaged over ranks here, not by DistributedDataParallel

    def __init__(self, sub: Subspace) -> None:
        self.sub = sub

    @property
    @abstractmethod
    def weight(self) -> nn.Parameter:
        """The parameter the subspace belongs to, looked up afresh, since others may replace it."""

    @property
    def replaced(self) -> bool:
        """Whether somebody has put something else in the place of what was attached; it may or may not call it."""
        return False

    def attach(self, mode: Mode) -> None:
        """Connect in a mode. In optimizer mode the coordinates are zero; the forward is the plain layer's.

        Args:
            mode: ``optimizer`` or ``adapter``. Raises `ModeError`, with nothing changed, where it cannot be had.
        """
        self._connect(mode)
        setattr(self.weight, _MARK, id(self.weight))  # a saved copy keeps it, and is another object

    def detach(self) -> None:
        """Disconnect and leave the model's structure as it was found; weights and coordinates are not touched."""
        delattr(self.weight, _MARK)
        self._disconnect()

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
        return f"{self.sub.transform}, coords={tuple(self.coords.shape)}, active={self.active}"

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Coords:
        asked = fn(self.coords.detach()[:0])
        if asked.is_meta:
            raise ModeError(
                f"{self.sub.name} is being trained, and a move to the meta device would throw away its basis and coordinates; "
                "call detach() first"
            )
        super()._apply(lambda t: t.to(device=asked.device, dtype=wide(asked.dtype)), recurse)  # type: ignore[no-untyped-call]
        self.sub.move(asked.device)
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
        if self.active:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            if strict and f"{prefix}coords" not in state_dict:
                error_msgs.append(
                    f"there is no {prefix}coords: the file is of a plain model, or was saved in optimizer mode; "
                    "call opt.switch('optimizer') before loading it"
                )
        elif f"{prefix}coords" in state_dict:
            error_msgs.append(
                f"{prefix}coords was saved in adapter mode, but this model is in optimizer mode; "
                "call opt.switch('adapter') before loading it"
            )


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
    if getattr(param, _MARK, None) == id(param):
        raise ModeError(f"'{name}' is wrapped already; call detach() on the optimizer that has it first")
    children = getattr(module, "_modules", {}).values()
    *_, owner, last = ["", *name.split(".")]
    ours = last == "coords" and owner.partition("_")[0] == CHILD  # all that is known of a bare parameter is its name
    if ours or hasattr(param, _MARK) or isinstance(module, Coords) or any(isinstance(child, Coords) for child in children):
        raise ModeError(
            f"'{name}' is in a copy of a wrapped model, which is good for evaluation only; copy the model after detach(), "
            "or load state_dict() of the wrapped one in optimizer mode into a new model"
        )


# torch.compile breaks its graph where an attachment's autograd function is called: what its backward hands to a refresh is a
# side effect, which a compiled graph would lose. Unlike torch.compiler.disable, torch.optim's own helper waits with the
# import of the compiler, which takes longer than that of torch.
uncompiled: Callable[[Callable[..., Any]], Callable[..., Any]] = torch._disable_dynamo  # type: ignore[attr-defined]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, for a backward that nobody differentiates without its price."""
    refusing: Callable[..., Any] = once_differentiable(backward)

    @wraps(backward)
    def chosen(*args: Any) -> Any:
        return refusing(*args) if torch.is_grad_enabled() else backward(*args)

    return chosen
