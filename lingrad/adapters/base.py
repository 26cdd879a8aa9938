"""What every attachment offers, and the module that holds coordinates inside a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lingrad._typing import override
from lingrad.errors import ModeError
from lingrad.layout import ATTACHED
from lingrad.subspace import Subspace

Mode = Literal["optimizer", "adapter"]

CHILD = "lingrad"  # the name under which a layer holds its coordinates


class Attachment(ABC):
    """The connection between one subspace and the autograd graph of a model.

    Args:
        sub: The subspace.
    """

    def __init__(self, sub: Subspace) -> None:
        self.sub = sub

    def attach(self, mode: Mode) -> None:
        """Connect in a mode. In optimizer mode the coordinates are zero; the forward is the plain layer's.

        Args:
            mode: ``optimizer`` or ``adapter``.

        Raises:
            ModeError: The mode cannot be had, or the weight is attached already; nothing was changed.
        """
        if hasattr(self.weight, ATTACHED):
            raise ModeError(f"'{self.sub.name}' is wrapped already; call detach() on the optimizer that has it first")
        self._connect(mode)
        setattr(self.weight, ATTACHED, True)

    def detach(self) -> None:
        """Disconnect and leave the model's structure as it was found; weights and coordinates are not touched."""
        delattr(self.weight, ATTACHED)
        self._disconnect()

    @property
    @abstractmethod
    def weight(self) -> nn.Parameter:
        """The parameter the subspace belongs to, looked up afresh, since others may replace it."""

    @abstractmethod
    def _connect(self, mode: Mode) -> None: ...

    @abstractmethod
    def _disconnect(self) -> None: ...


class Coords(nn.Module):
    """Coordinates as a module, so that a model's parameters include them.

    In optimizer mode it is absent from ``state_dict``, which stays the plain model's; in adapter mode the coordinates are
    part of the model's weights and are saved with them.

    Args:
        sub: The subspace whose coordinates it holds.
    """

    def __init__(self, sub: Subspace) -> None:
        super().__init__()
        self.coords = sub.coords
        self.sub = sub
        self.active = False

    @override
    def extra_repr(self) -> str:
        return f"{self.sub.transform}, coords={tuple(self.coords.shape)}, active={self.active}"

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
        elif f"{prefix}coords" in state_dict:
            error_msgs.append(
                f"{prefix}coords was saved in adapter mode, but this model is in optimizer mode; "
                "call opt.switch('adapter') before loading it"
            )


class Uncompiled(torch.autograd.Function):
    """An autograd function that ``torch.compile`` leaves alone: it calls ``run``, and breaks its graph there.

    What the backward hands to a refresh is a side effect, which a compiled graph would lose.
    """

    run: ClassVar[Callable[..., Any]]

    @classmethod
    def hide_from_compiler(cls) -> None:
        """Make ``run``; when first needed and not on import, because the compiler takes a second to import."""
        if "run" not in cls.__dict__:
            reason = "lingrad hands gradients to the refresh of a basis from inside backward"
            cls.run = staticmethod(torch.compiler.disable(cls.apply, reason=reason))
