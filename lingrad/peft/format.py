"""An adapter's folder: ``adapter_config.json`` and ``adapter_model.safetensors``, written and read without PEFT.

What is written is a plain LoRA: rank and alpha of every module are equal, so that PEFT multiplies by 1 and W + B A comes out as
lingrad has it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad._files import write_whole
from lingrad.errors import ExportError
from lingrad.factors import Factors
from lingrad.peft import names
from lingrad.peft.slots import PREFIX, Side, Slot, places, slots, why_not
from lingrad.tensorfile import Piece, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FROZEN = "lingrad.frozen"  # in the metadata of the weights: parameter -> the factor that is a basis

# Classes for whose tasks PEFT has a class that generates; for other tasks it would save modules of its own accord.
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        ranks: Parameter -> rank of its adapter.
        whole: Names of the modules saved whole.
        biases: Names of the biases saved beside adapters.
        factor_bytes: Parameter -> bytes of its factors.
        nbytes: Bytes of the weights' file.
        plan: How the changes were divided.
        config: The adapter's config.
    """

    ranks: dict[str, int]
    whole: list[str]
    biases: list[str]
    factor_bytes: dict[str, int]
    nbytes: int
    plan: Plan = field(repr=False)
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """How a set of changes is divided among PEFT's forms.

    Args:
        slots: Parameter -> slot of its low-rank change.
        whole: Names of the modules saved whole, every place of one that is tied.
        biases: Names of biases beside adapters, or of layers that have no other change.
        tied: Whether a saved module's weight is tied to another's.
    """

    slots: dict[str, Slot]
    whole: list[str]
    biases: list[str]
    tied: bool

    def tensors(self, model: nn.Module) -> list[str]:
        """Names of the tensors that are written as they are, besides the factors: parameters and buffers."""
        state = model.state_dict()
        inside = [name for module in self.whole for name in state if name.startswith(f"{module}.")]
        return list(dict.fromkeys([*inside, *self.biases]))


def plan(model: nn.Module, low_rank: Mapping[str, int], full: Collection[str]) -> Plan:
    """Divide changes among PEFT's forms.

    Args:
        model: The plain model, on any device.
        low_rank: Parameter -> rank of its change.
        full: Names of parameters whose change has no low rank.

    Returns:
        The plan.

    Raises:
        ExportError: PEFT has no form for one of them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {*parameters, *dict(model.named_buffers(remove_duplicate=False))}
    for name in (*low_rank, *full):
        if name not in known:
            raise ExportError(f"the model has no parameter '{name}'; pass the model that was trained, or one of its config")
    if not low_rank:
        raise ExportError("nothing has a low-rank change, and an adapter of PEFT needs one; save the model instead")
    for name, reason in why_not(model, low_rank).items():
        raise ExportError(f"PEFT has no low-rank form for '{name}': {reason}. It can be saved whole, at the size of the weight")
    found = slots(model, low_rank)
    adapted = {slot.module for slot in found.values()}
    saved: dict[str, None] = {}
    biases, tied = [], False
    for name in full:
        every = places(model, name) if name in parameters else [name]
        tied = tied or len(every) > 1
        for place in every:
            module, _, attribute = place.rpartition(".")
            plain = isinstance(model.get_submodule(module), nn.Linear) and f"{module}.weight" not in full
            if attribute == "bias" and (module in adapted or plain):
                biases.append(place)
            else:
                _check_whole(model, module, place, adapted)
                saved[module] = None
    outermost = [m for m in saved if not any(m.startswith(f"{other}.") for other in saved)]
    return Plan(found, outermost, biases, tied)


def write_adapter(
    folder: Path,
    model: nn.Module,
    low_rank: Mapping[str, Factors],
    full: Mapping[str, Tensor],
    *,
    base: str = "",
    dtype: torch.dtype | None = None,
    frozen: Mapping[str, Side] | None = None,
) -> Written:
    """Write an adapter that PEFT loads.

    Args:
        folder: An existing folder, which gets the two files.
        model: The plain model: its modules, ties and class decide the form. It may be on the meta device where ``full`` has
            all that is saved whole.
        low_rank: Parameter -> change [m, n] of its layout's matrix. Like ``full`` it may read what it holds when it is asked,
            so that no more than one tensor need be in memory; each is asked for more than once.
        full: Parameter -> its value. Norms, embeddings, heads are saved with the whole of their modules, whose other parameters
            and buffers may be given too and are taken from ``model`` otherwise.
        base: Name or folder of the model that the changes were made to; PEFT's ``base_model_name_or_path``.
        dtype: Of the factors; None keeps that of each.
        frozen: Parameter -> which of its factors is a basis that was not trained, for `lingrad.peft.load`.

    Returns:
        What was written.

    Raises:
        ExportError: PEFT cannot express it; the message says why.
    """
    heads = {name: (factors.rank, factors.shape, factors.left.dtype) for name, factors in low_rank.items()}
    ranks = {name: rank for name, (rank, _, _) in heads.items() if rank}
    planned = plan(model, ranks, list(full))
    pieces: dict[str, Piece] = {}
    for name, slot in planned.slots.items():
        rank, shape, own_dtype = heads[name]
        if shape != slot.layout.shape:
            raise ExportError(f"the change of '{name}' is {shape}; expected {slot.layout.shape}, out x in")
        for i, (key, form) in enumerate(zip(slot.keys, slot.shapes(rank), strict=True)):
            pieces[key] = Piece(dtype or own_dtype, form, partial(_factor, low_rank, slot, i, dtype))
    adapted = {slot.module: slot for slot in planned.slots.values()}
    for name in planned.tensors(model):
        value = value_of(model, full, name)
        module, _, attribute = name.rpartition(".")
        beside = name in planned.biases and module in adapted
        key = f"{PREFIX}{module}.base_layer.{attribute}" if beside else PREFIX + name
        pieces[key] = Piece(value.dtype, tuple(value.shape), partial(value_of, model, full, name))
    config = _config(model, planned, ranks, base)
    metadata = {"format": "pt"} | ({FROZEN: json.dumps(dict(frozen))} if frozen else {})
    write_tensors(folder / WEIGHTS, pieces, metadata)
    write_whole(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    sizes = {
        name: sum(prod(p.shape) * p.dtype.itemsize for p in map(pieces.get, s.keys) if p) for name, s in planned.slots.items()
    }
    return Written(ranks, planned.whole, planned.biases, sizes, (folder / WEIGHTS).stat().st_size, planned, config)


def value_of(model: nn.Module, full: Mapping[str, Tensor], name: str) -> Tensor:
    """The value of a tensor that is written as it is.

    Args:
        model: The plain model.
        full: Values by name, for `write_adapter`.
        name: A parameter or buffer.

    Returns:
        What ``full`` has for it, or for a parameter tied to it, or else what the model has; on the CPU.

    Raises:
        ExportError: There is none, or it has another shape.
    """
    own, param = model.state_dict()[name], dict(model.named_parameters(remove_duplicate=False)).get(name)
    names = [name, *(places(model, name) if param is not None else [])]
    value = next((full[n] for n in names if n in full), own)
    if value.is_meta:
        raise ExportError(f"'{name}' is in a module that is saved whole; its value must be given too")
    if value.shape != own.shape:
        raise ExportError(f"'{name}' is {tuple(value.shape)}; expected {tuple(own.shape)} as in the model")
    return value.detach().cpu().contiguous()


def _factor(low_rank: Mapping[str, Factors], slot: Slot, which: int, dtype: torch.dtype | None) -> Tensor:
    """PEFT's A (0) or B (1) of a change, when its turn comes to be written."""
    return slot.encode(low_rank[slot.name])[which].detach().to("cpu", dtype).contiguous()


def _check_whole(model: nn.Module, module: str, name: str, adapted: set[str]) -> None:
    """Make sure that PEFT can save the module of a parameter whole."""
    inside = next((m for m in sorted(adapted) if m == module or m.startswith(f"{module}.") or not module), None)
    if not module:
        raise ExportError(f"'{name}' belongs to the model itself, which PEFT cannot save as one of its modules")
    if inside is not None:
        raise ExportError(
            f"'{name}' was trained in full, so that its module must be saved whole, and '{inside}' has a low-rank change; PEFT "
            "has no form for both. Train both one way, freeze the parameter, or save the model instead"
        )
    if isinstance(model.get_submodule(module), nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise ExportError(f"'{name}' lies in a list of modules, which PEFT cannot save whole")


def _config(model: nn.Module, planned: Plan, ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parameters = [name for name, _ in model.named_parameters()]
    by_module = {slot.module for slot in planned.slots.values() if not slot.by_parameter}
    by_parameter = {name for name, slot in planned.slots.items() if slot.by_parameter}
    adapted = {slot.module for slot in planned.slots.values()}
    default, special = names.rank_pattern({slot.target: ranks[name] for name, slot in planned.slots.items()})
    stored_in_out = any(
        slot.kind == "linear" and not isinstance(model.get_submodule(slot.module), nn.Linear) for slot in planned.slots.values()
    )
    saved = names.modules_to_save(planned.whole, modules, adapted) if planned.whole else None
    beside = {name.rpartition(".")[0] for name in planned.biases}
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base,
        "r": default,
        "lora_alpha": default,
        "rank_pattern": special,
        "alpha_pattern": special,
        "target_modules": names.target_modules(by_module, modules) if by_module else [],
        "target_parameters": names.target_parameters(by_parameter, parameters) if by_parameter else None,
        "modules_to_save": saved,
        "ensure_weight_tying": planned.tied and _ties_embeddings(model),
        "bias": "none" if not beside else "lora_only" if beside <= adapted else "all",
        "fan_in_fan_out": stored_in_out,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _task(model: nn.Module) -> str | None:
    if not (type(model).__name__.endswith(_GENERATES) and hasattr(model, "prepare_inputs_for_generation")):
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _ties_embeddings(model: nn.Module) -> bool:
    """Whether the model says, as those of transformers do, that its head is tied to its embedding."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False)) and bool(getattr(model, "_tied_weights_keys", None))
