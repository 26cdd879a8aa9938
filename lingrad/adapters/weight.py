"""Any other parameter: convolutions, embeddings, fused experts, tied weights, models whose modules are not known.

In optimizer mode a hook projects ``weight.grad`` as soon as it is complete and frees it, one weight after the other. In adapter
mode the weight is parametrized as W + S z (``torch.nn.utils.parametrize``), and its gradient is projected inside backward.
Products with fused experts never form it: see `lingrad.adapters.experts`.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lingrad.adapters.base import CHILD, Attachment, Coords
from lingrad.adapters.effective import read
from lingrad.adapters.experts import ExpertsReader, fuses_experts
from lingrad.adapters.hooks import refuse_hooks
from lingrad.adapters.reading import keep_tied, make_plain, make_readable
from lingrad.config.settings import Mode
from lingrad.errors import ModeError
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import call
from lingrad.weights.dense import DenseWeight

# A module of these calls every child in its forward, and holds parameters of its own only in a subclass.
_RUN_THEIR_CHILDREN = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class WeightAttachment(Attachment):
    """A hook in optimizer mode, a parametrization in adapter mode.

    Args:
        sub: The subspace of the weight; several modules may hold it, or none may be known, which leaves optimizer mode.
        plain: See `Attachment`.
    """

    averages = True

    def __init__(self, sub: Subspace, weight: DenseWeight, *, plain: bool = False) -> None:
        super().__init__(sub, plain=plain)
        self.weight = weight
        self.handle: Any = None  # of the hook; None while parametrized
        self.orders: list[list[str]] = []
        self.holder = Coords(sub, active=False)

    @override
    def require(self, mode: Mode) -> None:
        if mode == "adapter":
            refuse_hooks(self.sub.name, self.weight.param, "in adapter mode the gradient is that of W + S z")

    @override
    def leave_gradient(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    @override
    def _connect(self, mode: Mode) -> None:
        if mode == "optimizer":
            weight, trains = self.weight.param, self.weight.param.requires_grad
            self.sub.coords.requires_grad_(trains)
            capture = weakref.WeakMethod(self._capture)  # a cycle through a tensor's hooks would never be freed
            self.handle = weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(call, capture))
            weight.requires_grad_(trains)
            for module, attribute in self.weight.owners[:1]:
                if not isinstance(module, _RUN_THEIR_CHILDREN):
                    module.add_module(f"{CHILD}_{attribute}", self.holder)
            if self._fuses:
                make_readable(*self.weight.owners[0], ExpertsReader(self.sub, adapter=False).read, _nothing)
            return
        if not self.weight.owners:
            raise ModeError(
                f"adapter mode must change the forward of the layer that uses {self.sub.name}, but only parameters were given; "
                "pass the model itself"
            )
        for module, _ in self.weight.owners:
            if getattr(module, "max_norm", None) is not None:
                raise ModeError(
                    f"{self.sub.name} is an embedding with max_norm, which rescales its rows in every forward; in adapter mode "
                    "these are not the rows that are trained. Use optimizer mode, or leave this weight out by a rule: 'none'"
                )
        self.sub.coords.requires_grad_(self.weight.param.requires_grad)
        self.weight.param.requires_grad_(False)
        self.orders = [list(module._parameters) for module, _ in self.weight.owners]
        for module, attribute in self.weight.owners:
            effective = _Effective(self.sub, active=not self.plain)
            if self._fuses:
                effective.reader = ExpertsReader(self.sub, adapter=True)
            parametrize.register_parametrization(module, attribute, effective, unsafe=True)
            keep_tied(module)

    @override
    def _keys(self) -> list[tuple[nn.Module, str, str]]:
        return [(module, name, f"parametrizations.{name}.original") for module, name in self.weight.owners]

    @override
    def _disconnect(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            for module, attribute in self.weight.owners[:1]:
                module._modules.pop(f"{CHILD}_{attribute}", None)
            if self._fuses:
                make_plain(*self.weight.owners[0])
            return
        for (module, attribute), order in zip(self.weight.owners, self.orders, strict=True):
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            # the weight came back as the last of the module's parameters; others of them may be parametrized still
            for name in [name for name in order if name in module._parameters]:
                module._parameters[name] = module._parameters.pop(name)
        self.weight.param.requires_grad_(self.sub.coords.requires_grad)

    @property
    def _fuses(self) -> bool:
        """Whether the weight fuses experts of one layer, whose products have a projected backward."""
        return len(self.weight.owners) == 1 and fuses_experts(self.sub)

    def _capture(self, weight: Tensor) -> None:
        sub = self.sub
        if not sub.released and bool(sub.coords.any()):
            raise ModeError(
                f"the coordinates of {sub.name} were written to (as SAM does), and in optimizer mode its layer does not read "
                "them; use lingrad.adapt, or leave this weight out by a rule: 'none'"
            )
        sub.take(weight)


class _Effective(Coords):
    """The parametrization W -> W + S z."""

    reader: ExpertsReader | None = None

    @override
    def forward(self, weight: Tensor) -> Tensor:
        return read(self.sub, averages=True) if self.reader is None else self.reader.read()


def _nothing() -> None: ...
