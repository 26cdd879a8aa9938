"""Linear layers whose weight is held in 4 or 8 bits, in adapter mode.

The layer's own forward runs as it is, and S z is added to what it gives. A merge dequantises, adds S z and quantises again:
what is smaller than a step of the grid is lost, and the loss of every merge is measured. With ``keep_remainder`` the part of
it that lies in the span of the new basis stays in the new coordinates (Loeschcke, Toftrup, Kastoryano, Belongie,
Snaebjarnarson, "LoQT: Low-Rank Adapters for Quantized Pretraining", NeurIPS 2024, arXiv 2405.16528, section 3, error
compensation).
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.adapters.base import Mode
from lingrad.adapters.linear import LayerAttachment
from lingrad.errors import ModeError
from lingrad.maps import LinearMap
from lingrad.subspaces.subspace import Subspace
from lingrad.weights.base import MergeLoss
from lingrad.weights.bitsandbytes import packed_of


@final
class QuantizedAttachment(LayerAttachment):
    """Coordinates beside a quantised weight.

    Args:
        sub: The subspace of the weight.
        module: The layer.
        attribute: The weight's name in the layer.
        plain: See `Attachment`; the plain model then has W + S z quantised, which loses what a merge would.
        keep_remainder: Keep what a merge at a refresh loses, as far as the new basis can hold it.
    """

    def __init__(
        self, sub: Subspace, module: nn.Module, attribute: str, *, plain: bool = False, keep_remainder: bool = False
    ) -> None:
        super().__init__(sub, module, attribute, plain=plain)
        self.packed = packed_of(module, sub.name)
        self.keep_remainder = keep_remainder
        self.opened: Any = None
        self._changed = 0.0  # |S z| of the merge whose remainder is to be kept
        sub.loss = MergeLoss()

    @override
    def require(self, mode: Mode) -> None:
        if mode == "optimizer":
            raise ModeError(
                f"{self.sub.name} is held in {self.packed.kind}, and optimizer mode merges at every step: each would quantise "
                "the weight anew and lose every update smaller than half a step of its grid. Use lingrad.adapt, which merges "
                "at refreshes, or leave the weight out by a rule: 'none'"
            )

    @override
    def merge(self, *, release: bool = False) -> Tensor | None:
        sub = self.sub
        if not bool(sub.coords.any()):  # quantising anew would change the weight for nothing
            return None
        sub.merged = True
        if sub.ledger is not None:
            sub.ledger.merged(sub.coords)
        lift = sub.map().lift(sub.coords.detach().float())
        wanted = self.packed.dense().add_(lift)
        changed = float(torch.linalg.vector_norm(lift))
        self.packed.write(wanted)
        remainder = wanted.sub_(self.packed.dense())
        sub.coords.zero_()
        if self.keep_remainder and sub.proposal is not None:
            self._changed = changed
            return remainder
        self._lost(remainder, changed)
        return None

    @override
    def keep(self, current: LinearMap, remainder: Tensor) -> None:
        sub = self.sub
        sub.coords.copy_(current.fit(remainder))
        if sub.ledger is not None:
            sub.ledger.merged(-sub.coords.detach())  # they stand for what was merged before, and are in the ledger already
        self._lost(remainder.sub_(current.lift(sub.coords.detach().float())), self._changed)

    @override
    def decaying(self) -> list[Tensor]:
        return [*self.packed.scales(), self.sub.coords]

    @override
    def base(self) -> Tensor:
        return self.packed.dense()

    @override
    def lifted(self) -> Tensor:
        return self.packed.dense().add_(self.sub.map().lift(self.sub.coords.detach().float())).to(self.packed.dtype)

    @override
    def held(self) -> list[Tensor]:
        return self.packed.tensors()

    @override
    def stored(self) -> dict[str, Tensor]:
        return {f"weight.{key}": value for key, value in self.packed.state().items()}

    @override
    def _hook(self, mode: Mode) -> None:
        self._hooks.append(self.module.register_load_state_dict_pre_hook(partial(self._take)))
        if self.plain:
            self._hooks.append(self.module.register_state_dict_post_hook(partial(self._put)))

    @override
    def _connect(self, mode: Mode) -> None:
        self.require(mode)
        self.opened = self.packed.open()
        super()._connect(mode)

    @override
    def _disconnect(self) -> None:
        super()._disconnect()
        self.packed.close(self.opened)

    @override
    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._plain(*args, **kwargs) if self.mode is None else self._tie(args, kwargs)

    def _lost(self, remainder: Tensor, changed: float) -> None:
        if self.sub.loss is not None:
            self.sub.loss = self.sub.loss.plus(float(torch.linalg.vector_norm(remainder)), changed)

    @torch.no_grad()
    def _put(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Put W + S z, quantised, in the place of W in a state_dict that was made."""
        if bool(self.sub.coords.any()):
            wanted = self.packed.dense().add_(self.sub.map().lift(self.sub.coords.detach().float()))
            state.update({f"{prefix}{key}": value for key, value in self.packed.entries(wanted).items()})

    @torch.no_grad()
    def _take(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take the scales of a state_dict that is about to be loaded: bitsandbytes cannot, where a layer is quantised."""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for key in self.packed.take(own):
            state.pop(f"{prefix}{key}", None)
        if self.plain and "weight" in own:
            self.sub.coords.data.zero_()
