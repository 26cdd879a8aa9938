"""Linear layers whose weight is stored in 4 or 8 bits: their own forward runs, and S z is added."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import nn
from typing_extensions import override

from lingrad.adapters.linear import LayerAttachment
from lingrad.adapters.projected import Projection
from lingrad.config.settings import Mode
from lingrad.errors import ModeError
from lingrad.weights.packed import PackedWeight


@final
class PackedAttachment(LayerAttachment):
    """A linear layer with a weight in 4 or 8 bits, in adapter mode: its own forward runs, and S z is added.

    Args:
        weight: The weight.
        layer: See `LayerAttachment`.
        plain: See `Attachment`; the plain model then has W + S z quantised, which loses what a merge would.
    """

    def __init__(self, weight: PackedWeight, layer: Projection, *, plain: bool = False) -> None:
        super().__init__(weight.module, "weight", layer, plain=plain)
        self.packed = weight
        self._opened: Any = None

    @override
    def require(self, mode: Mode) -> None:
        if mode == "optimizer" and self.packed.rounding is None:
            other = " Or round in another way: rounding='stochastic' or 'compensated'." if self.packed.kind == "int8" else ""
            raise ModeError(
                f"{self.sub.name} is stored as {self.packed.kind}, and optimizer mode merges at every step: each would "
                "quantise the weight again and lose every update smaller than half a step of its grid. Use lingrad.adapt, "
                f"which merges at refreshes, or leave the weight out by a rule: 'none'.{other}"
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
