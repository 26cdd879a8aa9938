"""An adapter's folder read without PEFT: every key must belong to the model, and nothing is executed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import CheckpointError, DataError, ShapeError
from lingrad.files.reading import all_finite
from lingrad.files.tensorfile import TensorFile
from lingrad.maps.factors import Factors
from lingrad.peft import names, patterns
from lingrad.peft.config import read_config
from lingrad.peft.earlier import owners, renamed
from lingrad.peft.slots import PREFIX, LoraFactor, Slot, aliases, slots
from lingrad.peft.write import FROZEN, WEIGHTS

_SAVED = re.compile(r"\.(modules_to_save|original_module)(?=\.)")  # between a module that PEFT saves in full and its parameters
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraPair:
    """PEFT's factors of one parameter's change.

    Args:
        slot: Where PEFT stores them.
        a: lora_A, as in the file.
        b: lora_B, as in the file.
        scaling: What PEFT multiplies B A by.
        frozen: Which of the two is a basis that was not trained, where the file says so.
    """

    slot: Slot
    a: Tensor
    b: Tensor
    scaling: float
    frozen: LoraFactor | None = None

    @property
    def rank(self) -> int:
        """The rank, of each expert where several are fused."""
        return self.slot.rank(self.a)

    @property
    def factors(self) -> Factors:
        """The change [m, n] of the layout's matrix."""
        found = self.slot.decode(self.a, self.b)
        return found if self.scaling == 1.0 else Factors(found.left * self.scaling, found.right)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Args:
        low_rank: Parameter -> its factors.
        full: Parameter or buffer -> its value, of what was saved in full. PEFT saves an embedding together with its adapter:
            the value is then that of the base model.
        config: The adapter's config.
    """

    low_rank: dict[str, LoraPair]
    full: dict[str, Tensor]
    config: Mapping[str, Any]

    @property
    def dropout(self) -> float:
        """The dropout in front of A while PEFT trains."""
        return float(self.config.get("lora_dropout") or 0.0)

    @torch.no_grad()
    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The weight that PEFT has with this adapter.

        Args:
            name: The parameter's name.
            weight: The base model's.

        Returns:
            W + B A as PEFT merges it, in the dtype of ``weight``; a copy of ``weight`` where the adapter does not change it.

        Raises:
            CheckpointError: The adapter is for a weight of another shape.
            DataError: It changes a weight that is stored as integers, or in 8 bits.
        """
        found = weight
        changes = name in self.low_rank or (name in self.full and self.full[name].is_floating_point())
        if changes and (not weight.is_floating_point() or weight.dtype.itemsize == 1):
            raise DataError(
                f"'{name}' is stored as {weight.dtype}, as in a quantised model, and the adapter would be rounded away; give "
                "the model that it was quantised from"
            )
        if name in self.full:
            if self.full[name].shape != weight.shape:
                raise CheckpointError(f"'{name}' is {tuple(self.full[name].shape)} in the adapter, {tuple(weight.shape)} here")
            found = self.full[name].to(weight.device, weight.dtype)
        pair = self.low_rank.get(name)
        if pair is None:
            return found.clone()
        if tuple(weight.shape) != pair.slot.layout.weight_shape:
            raise CheckpointError(f"'{name}' is for {pair.slot.layout.weight_shape} in the adapter, {tuple(weight.shape)} here")
        short = weight.is_floating_point() and weight.dtype.itemsize < 4
        wide = torch.float32 if short else weight.dtype  # the dtype in which PEFT multiplies and adds
        delta = pair.slot.delta(pair.slot.decode(pair.a.to(wide), pair.b.to(wide))) * pair.scaling
        return (found.to(wide) + delta.to(weight.device)).to(weight.dtype)


def read_adapter(folder: str | Path, model: nn.Module) -> Adapter:
    """Read an adapter for a model.

    Args:
        folder: The folder that holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The plain model, on any device; no weight of it is read.

    Returns:
        The adapter, its tensors in the dtypes of the file.

    Raises:
        DataError: The folder is not that of a LoRA, is damaged, or has its weights in a pickle, which is not opened.
        CheckpointError: It is an adapter of another model.
    """
    folder = Path(folder)
    config: Mapping[str, Any] = read_config(folder)
    file = open_weights(folder)
    frozen = _frozen(file)
    config, keys, read = renamed(model, config, file)
    found, scaling = _find_slots(model, config, set(keys)), _scalings(config)
    low_rank = {}
    for name, slot in found.items():
        a, b = (read(key) for key in slot.keys)
        low_rank[name] = LoraPair(slot, a, b, scaling(slot, a, b), frozen.get(name))
    factor_keys = {key for slot in found.values() for key in slot.keys}
    own = model.state_dict()
    full: dict[str, Tensor] = {}
    for key in sorted(set(keys) - factor_keys):
        name = re.sub(r"(\.base_layer)+(?=\.)", "", key.removeprefix(PREFIX))
        inner = _SAVED.sub("", name)
        if name not in own and inner in own:  # with bias="all" PEFT writes both copies of a saved module's bias too
            if ".original_module." in name:
                continue
            name = inner
        if not key.startswith(PREFIX) or name not in own:
            raise CheckpointError(f"the adapter has '{key}', and the model has no '{name}': it is for another model")
        value = read(key)
        if name in full and not torch.equal(full[name], value):
            raise CheckpointError(f"the adapter has two values for '{name}'; save it again with PEFT")
        full[name] = value
        if full[name].shape != own[name].shape:
            raise CheckpointError(
                f"'{name}' is {tuple(full[name].shape)} in the adapter, {tuple(own[name].shape)} in the model"
            )
    tensors = full | {name: pair.a for name, pair in low_rank.items()} | {f"{n} (B)": p.b for n, p in low_rank.items()}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise DataError(f"'{name}' in '{folder}' has values that are not finite")
    for name, pair in low_rank.items():
        for side in (pair.a, pair.b):
            if side.dtype not in _DTYPES:
                raise DataError(f"the factors of '{name}' in '{folder}' are {side.dtype}; save them in float32 or bfloat16")
            if not all_finite(side * pair.scaling):
                raise DataError(f"the factors of '{name}' in '{folder}' are not finite with their scaling of {pair.scaling:g}")
    _require_ties(model, full, bool(config.get("ensure_weight_tying")))
    _require_biases(config, low_rank, own, full)
    return Adapter(low_rank, full, config)


def open_weights(folder: Path) -> TensorFile:
    """The file of an adapter's weights.

    Args:
        folder: The adapter's folder.

    Returns:
        The file; nothing but its header is read.

    Raises:
        DataError: There is none, it is damaged, or the weights are in a pickle.
    """
    if not (folder / WEIGHTS).exists():
        pickled = next((f.name for f in sorted(folder.glob("*.bin"))), None)
        if pickled is not None:
            raise DataError(
                f"'{folder}' has its weights in {pickled}, a pickle, which may hold code and is not opened; "
                f"if you trust it, load it with PEFT and save it again as {WEIGHTS}"
            )
        raise DataError(f"'{folder}' has no {WEIGHTS}: it is not an adapter's folder, or is incomplete")
    return TensorFile(folder / WEIGHTS)


def _require_ties(model: nn.Module, full: Mapping[str, Tensor], ties: bool) -> None:
    """Make sure that tied weights stay equal: PEFT gives each module that it saves in full a copy of its own."""
    params = dict(model.named_parameters(remove_duplicate=False))
    for name in full:
        every = aliases(model, name) if name in params else [name]
        for other in every:
            same = torch.equal(full[other], full[name]) if other in full else ties
            if not same:
                raise CheckpointError(
                    f"'{name}' and '{other}' are one tensor in the model, and the adapter has different values for them, which "
                    "a plain model of this config cannot have; train the adapter with ensure_weight_tying=True, or save neither"
                )


def _require_biases(config: Mapping[str, Any], low_rank: Collection[str], own: Collection[str], full: Collection[str]) -> None:
    """Make sure that trained biases are in the file: before 0.21 PEFT left those of ``lora_only`` out."""
    biases = [name for name in (f"{factor.rpartition('.')[0]}.bias" for factor in low_rank) if name in own]
    if config.get("bias") == "lora_only" and biases and not any(name in full for name in biases):
        raise CheckpointError(
            f"the adapter is trained with bias='lora_only', and its file has no '{biases[0]}', nor any other bias: PEFT before "
            "0.21 leaves them out. Save it again with PEFT 0.21 or later from the trained model; to go on without the biases, "
            'write "bias": "none" in adapter_config.json'
        )


def _find_slots(model: nn.Module, config: Mapping[str, Any], keys: set[str]) -> dict[str, Slot]:
    """The slots of the factors in a file."""
    modules = dict(model.named_modules())
    targets = config.get("target_parameters") or []
    chosen: list[str] = []
    for owner in owners(keys):
        own = [f"{owner}.{attribute}" for attribute, _ in modules[owner].named_parameters(recurse=False)]
        by_parameter = [name for name in own if any(names.targeted(name, entry) for entry in targets)]
        if not by_parameter and f"{owner}.weight" not in own:
            raise CheckpointError(f"the adapter has factors for '{owner}', a {type(modules[owner]).__name__} without a weight")
        left_out = None if by_parameter else names.left_out_by(owner, config)
        if left_out is not None:
            raise CheckpointError(
                f"the adapter has factors for '{owner}', which {left_out} in its config leaves out, so that PEFT would not "
                "load them; correct the config, or take the factors out of the file"
            )
        chosen += by_parameter or [f"{owner}.weight"]
    try:
        found = slots(model, chosen)
    except ShapeError as error:
        raise CheckpointError(str(error)) from None
    for slot in found.values():
        for key in slot.keys:
            if key not in keys:
                raise CheckpointError(f"the adapter has no '{key}', which its config and the model ask for")
    if not found:
        raise DataError("the adapter has no low-rank factors")
    return found


def _scalings(config: Mapping[str, Any]) -> Callable[[Slot, Tensor, Tensor], float]:
    """What PEFT multiplies B A by; the two must be of the rank in the config."""
    ranks, alphas = (
        patterns.values(config.get(f"{kind}_pattern") or {}, config[option])
        for kind, option in (("rank", "r"), ("alpha", "lora_alpha"))
    )

    def scaling(slot: Slot, a: Tensor, b: Tensor) -> float:
        rank = ranks(slot.target)
        if (tuple(a.shape), tuple(b.shape)) != slot.shapes(rank):
            raise CheckpointError(
                f"the factors of '{slot.name}' are {tuple(a.shape)} and {tuple(b.shape)}; "
                f"expected {slot.shapes(rank)[0]} and {slot.shapes(rank)[1]} for this model and rank {rank}"
            )
        return float(alphas(slot.target) / (math.sqrt(rank) if config.get("use_rslora") else rank))

    return scaling


def _frozen(file: TensorFile) -> dict[str, LoraFactor]:
    try:
        found = json.loads(file.metadata.get(FROZEN, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(side in ("A", "B") for side in found.values()):
        raise DataError(f"{file.path}: the metadata '{FROZEN}' must map parameters to A or B")
    return found
