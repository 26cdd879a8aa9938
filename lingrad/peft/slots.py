"""Where PEFT stores the low-rank change of a parameter, and in what shape; or why it has no form for one.

A change is ``left @ right`` [m, n] in the matrix of its layout, however the weight is stored. PEFT's factors are, by kind:

| kind | weight | lora_A | lora_B |
|---|---|---|---|
| linear | [out, in], or [in, out] in a Conv1D of GPT-2 | right [r, in] | left [out, r] |
| embedding | [tokens, dim] | left^T [r, tokens] | right^T [dim, r] |
| conv | [out, in, *kernel] | right [r, in, *kernel] | left [out, r, 1, ...] |
| parameter | [out, in], of a module that PEFT has no layer for | right [r, in] | left [out, r] |
| experts | [experts, out, in]; one right factor for all | [experts * r, in] | [out, r * experts] |
| experts_in_out | [experts, in, out]; one right factor for all | [experts * r, in] | [out, r * experts] |

For fused experts the expert is the slow index of lora_A's rows and the fast one of lora_B's columns. Wrappers of several
parameters of one module are nested, the first innermost, which shows in their keys.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from lingrad.errors import ShapeError
from lingrad.maps.factors import Factors
from lingrad.weights.layout import Layout, is_conv1d, layout_of

LoraFactor = Literal["A", "B"]  # PEFT's names
FactorSide = Literal["left", "right"]  # of a change left @ right
SlotKind = Literal["linear", "embedding", "conv", "parameter", "experts", "experts_in_out"]

PREFIX = "base_model.model."
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Slot:
    """Where PEFT stores the change of one parameter.

    Args:
        name: The parameter's name.
        kind: How its factors are laid out.
        layout: How lingrad reads it as a matrix.
        wrappers: How many wrappers of other parameters of its module are around its own.
    """

    name: str
    kind: SlotKind
    layout: Layout
    wrappers: int = 0

    @property
    def module(self) -> str:
        """The name of the module that owns the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def target(self) -> str:
        """What PEFT matches with rank_pattern and alpha_pattern: the module's name, or the parameter's."""
        return self.name if self.by_parameter else self.module

    @property
    def by_parameter(self) -> bool:
        """Whether it is named in target_parameters, not in target_modules."""
        return self.kind in ("parameter", "experts", "experts_in_out")

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of lora_A and lora_B in the file."""
        owner = PREFIX + self.module + ".base_layer" * self.wrappers
        if self.kind == "embedding":
            return f"{owner}.lora_embedding_A", f"{owner}.lora_embedding_B"
        return f"{owner}.lora_A.weight", f"{owner}.lora_B.weight"

    @property
    def experts(self) -> int:
        """How many experts are fused in the parameter."""
        return self.layout.weight_shape[0] if self.kind in ("experts", "experts_in_out") else 1

    def factor_on(self, side: FactorSide) -> LoraFactor:
        """PEFT's name of the left or the right factor."""
        left_is_a = self.kind in ("embedding", "experts_in_out")
        return "A" if (side == "left") == left_is_a else "B"

    def side_of(self, factor: LoraFactor) -> FactorSide:
        """The inverse of `factor_on`."""
        return "left" if self.factor_on("left") == factor else "right"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of lora_A and lora_B of a rank."""
        m, n = self.layout.shape
        shape = self.layout.weight_shape
        if self.kind == "embedding":
            return (rank, m), (n, rank)
        if self.kind == "conv":
            return (rank, *shape[1:]), (m, rank, *(1 for _ in shape[2:]))
        if self.kind == "experts":
            return (shape[0] * rank, shape[2]), (shape[1], rank * shape[0])
        if self.kind == "experts_in_out":
            return (shape[0] * rank, shape[1]), (shape[2], rank * shape[0])
        return (rank, n), (m, rank)

    def encode(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """PEFT's factors of a change.

        Args:
            factors: [m, r] and [r, n].

        Returns:
            lora_A and lora_B, for a scaling of 1.
        """
        left, right, e = factors.left, factors.right, self.experts
        if self.kind == "embedding":
            return left.t(), right.t()
        if self.kind == "conv":
            a, b = self.shapes(factors.rank)
            return right.reshape(a), left.reshape(b)
        if self.kind == "experts":
            return repeat(right, "r i -> (e r) i", e=e), rearrange(left, "(e o) r -> o (r e)", e=e)
        if self.kind == "experts_in_out":
            return rearrange(left, "(e i) r -> (e r) i", e=e), repeat(right, "r o -> o (r e)", e=e)
        return right, left

    def decode(self, a: Tensor, b: Tensor, *, shared: bool | None = None) -> Factors:
        """The change that PEFT's factors make, for a scaling of 1; the inverse of `encode`.

        Args:
            a: lora_A.
            b: lora_B, of the shapes that `shapes` gives.
            shared: Whether fused experts share their right factor; None to find out from the values.

        Returns:
            Factors of the same rank; where experts do not share their right factor, of the sum of their ranks.
        """
        if self.kind == "embedding":
            return Factors(a.t(), b.t())
        if self.kind == "conv":
            return Factors(b.flatten(1), a.flatten(1))
        if self.kind not in ("experts", "experts_in_out"):
            return Factors(b, a)
        each_a = rearrange(a, "(e r) i -> e r i", e=self.experts)
        each_b = rearrange(b, "o (r e) -> e o r", e=self.experts)
        lefts, rights = (each_b, each_a) if self.kind == "experts" else (each_a.mT, each_b.mT)
        if bool((rights == rights[:1]).all()) if shared is None else shared:
            return Factors(lefts.flatten(0, 1), rights[0])
        return Factors(torch.block_diag(*lefts), rights.flatten(0, 1))

    def rank(self, a: Tensor) -> int:
        """The rank of factors, by the shape of lora_A."""
        return a.shape[0] // self.experts

    def delta(self, factors: Factors) -> Tensor:
        """The change in the shape of the weight."""
        return self.layout.restore(factors.dense())


def slots(model: nn.Module, names: Collection[str]) -> dict[str, Slot]:
    """The slots of parameters that change together.

    Args:
        model: Their model, on any device.
        names: Their names.

    Returns:
        Name -> slot.

    Raises:
        ShapeError: PEFT has no slot for one of them; see `why_not`.
    """
    found: dict[str, Slot] = {}
    wrapped: dict[str, list[str]] = {}
    owners = _owners(model)
    for name in names:
        reason, slot = _slot(model, owners, name)
        if slot is None:
            raise ShapeError(f"PEFT has no low-rank form for '{name}': {reason}")
        found[name] = slot
        if slot.by_parameter:
            wrapped.setdefault(slot.module, []).append(name)
    for module, together in wrapped.items():
        order = [f"{module}.{attribute}" for attribute, _ in model.get_submodule(module).named_parameters(recurse=False)]
        together.sort(key=order.index)
        for i, name in enumerate(together):
            found[name] = Slot(name, found[name].kind, found[name].layout, len(together) - 1 - i)
    return found


def why_not(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Which parameters PEFT has no low-rank form for, so that they can only be saved in full.

    Args:
        model: Their model, on any device.
        names: Their names.

    Returns:
        Name -> reason, of those.
    """
    owners = _owners(model)
    found = {name: _slot(model, owners, name) for name in names}
    return {name: reason for name, (reason, slot) in found.items() if slot is None}


def aliases(model: nn.Module, name: str) -> list[str]:
    """All names of a parameter, several where it is tied; in the model's order."""
    param = model.get_parameter(name)
    return [n for n, p in model.named_parameters(remove_duplicate=False) if p is param]


Owners = dict[int, list[str]]  # id of a parameter -> all its names


def _owners(model: nn.Module) -> Owners:
    found: Owners = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(param), []).append(name)
    return found


def _slot(model: nn.Module, owners: Owners, name: str) -> tuple[str, Slot | None]:
    param = model.get_parameter(name)
    owner, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    known = owners[id(param)]
    if len(known) > 1:
        return f"it is tied to {', '.join(n for n in known if n != name)}, and PEFT would change only one of them", None
    if not owner:
        return "it belongs to the model itself, which PEFT cannot wrap", None
    outer = model.get_submodule(owner.rpartition(".")[0])
    reader = next((m for m in (module, outer) if isinstance(m, nn.MultiheadAttention | nn.RNNBase)), None)
    if reader is not None:
        return f"nn.{type(reader).__name__} reads it without calling a layer, so PEFT's layer would have no effect", None
    layout = layout_of(param, module, name)
    if attribute == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module)):
        return "", Slot(name, "linear", layout)
    if attribute == "weight" and isinstance(module, nn.Embedding):
        return "", Slot(name, "embedding", layout)
    if isinstance(module, nn.modules.conv._ConvNd):
        reason = _why_no_conv(module)
        return reason, None if reason or attribute != "weight" else Slot(name, "conv", layout)
    if param.dim() == 2:
        return "", Slot(name, "parameter", layout)
    if param.dim() != 3:
        return f"it has {param.dim()} dimensions and belongs to a {type(module).__name__}", None
    experts, rows, columns = param.shape
    if experts == 1 or layout.shape != (experts * rows, columns):
        return f"its {experts} experts of {rows} x {columns} do not share a right factor of low rank", None
    return "", Slot(name, "experts_in_out" if getattr(module, "is_transposed", False) else "experts", layout)


def _why_no_conv(module: nn.modules.conv._ConvNd) -> str:
    if type(module) not in _CONVS:
        return f"PEFT has no layer for a {type(module).__name__}"
    if module.groups > 1:
        return f"it is a convolution in {module.groups} groups, whose adapter PEFT cannot merge"
    if any(size != 1 for size in module.dilation) or module.padding_mode != "zeros":
        return "PEFT's convolution adapters support no dilation and no padding other than zeros"
    return ""
