"""An adapter's folder: ``adapter_config.json`` and ``adapter_model.safetensors``, written and read without PEFT.

It is a plain LoRA: rank and alpha of every module are equal, so that PEFT multiplies by 1 and its W + B A is that of lingrad.
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

from lingrad.deprecated import renamed_keywords
from lingrad.errors import ExportError
from lingrad.files.atomic import write_whole
from lingrad.files.reading import all_finite
from lingrad.files.tensorfile import Piece, write_tensors
from lingrad.maps.factors import Factors
from lingrad.peft import names
from lingrad.peft.slots import PREFIX, LoraFactor, Slot, aliases, slots, why_not

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FROZEN = "lingrad.frozen"  # in the metadata of the weights: parameter -> the factor that is a basis

# Classes with a task for which PEFT has a class that generates; for other tasks PEFT saves more modules than asked.
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        ranks: Parameter -> rank of its adapter.
        saved_modules: Names of the modules saved in full.
        alongside: Names of the parameters saved alongside the adapters, without the rest of their module.
        factor_bytes: Parameter -> bytes of its factors.
        nbytes: Bytes of the weights' file.
        plan: How the changes were divided.
        config: The adapter's config.
    """

    ranks: dict[str, int]
    saved_modules: list[str]
    alongside: list[str]
    factor_bytes: dict[str, int]
    nbytes: int
    plan: AdapterPlan = field(repr=False)
    config: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class AdapterPlan:
    """How a set of changes is divided among PEFT's forms.

    Args:
        slots: Parameter -> slot of its low-rank change.
        saved_modules: Names of the modules saved in full, under all names where one is tied.
        alongside: Names of the parameters saved alongside the adapters: biases of layers, and parameters of modules that
            contain adapters.
        tied: Whether a saved module's weight is tied to another's.
    """

    slots: dict[str, Slot]
    saved_modules: list[str]
    alongside: list[str]
    tied: bool

    def key(self, name: str) -> str:
        """The key of a tensor that is saved in full: PEFT wraps the modules of adapters, once for each parameter."""
        owner, _, attribute = name.rpartition(".")
        wrappers = sum(slot.module == owner for slot in self.slots.values()) if name in self.alongside else 0
        return ".".join([PREFIX + owner, *["base_layer"] * wrappers, attribute]) if owner else PREFIX + name

    def tensors(self, model: nn.Module) -> list[str]:
        """Names of the tensors that are saved in full: parameters and buffers."""
        state = model.state_dict()
        inside = [name for module in self.saved_modules for name in state if name.startswith(f"{module}.")]
        return list(dict.fromkeys([*inside, *self.alongside]))


def plan(model: nn.Module, low_rank: Mapping[str, int], full: Collection[str]) -> AdapterPlan:
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
        raise ExportError(
            f"PEFT has no low-rank form for '{name}': {reason}. It can be saved in full, at the size of the weight"
        )
    found = slots(model, low_rank)
    adapted = {slot.module for slot in found.values()}
    saved: dict[str, None] = {}
    alongside, tied = [], False
    for name in full:
        every = aliases(model, name) if name in parameters else [name]
        tied = tied or len(every) > 1
        for alias in every:
            if _stands_alone(model, alias, adapted, full):
                alongside.append(alias)
            else:
                saved[alias.rpartition(".")[0]] = None
    outermost = [m for m in saved if not any(m.startswith(f"{other}.") for other in saved)]
    return AdapterPlan(found, outermost, alongside, tied)


@renamed_keywords("lingrad.peft.write_adapter", base="start")
def write_adapter(
    folder: str | Path,
    model: nn.Module,
    low_rank: Mapping[str, Factors],
    full: Mapping[str, Tensor],
    *,
    start: str = "",
    dtype: torch.dtype | None = None,
    frozen: Mapping[str, LoraFactor] | None = None,
) -> Written:
    """Write an adapter that PEFT loads.

    Args:
        folder: An existing folder, which gets the two files.
        model: The plain model: its modules, ties and class decide the form. It may be on the meta device where ``full`` has
            all that is saved in full.
        low_rank: Parameter -> change [m, n] of its layout's matrix. Both mappings may read a value when it is looked up, so
            that one tensor at a time is in memory; each is looked up more than once.
        full: Parameter -> its value. Norms, embeddings and heads are saved with their module in full; its other parameters and
            buffers may be given too, and are taken from ``model`` otherwise.
        start: Name or folder of the model that the changes were made to; PEFT's ``base_model_name_or_path``.
        dtype: Of the factors; None for the dtype of each.
        frozen: Parameter -> which of its factors is a basis that was not trained, for `lingrad.peft.load`.

    Returns:
        What was written.

    Raises:
        ExportError: PEFT cannot express it; the message says why.
    """
    folder = Path(folder)
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
    for name in planned.tensors(model):
        value = value_of(model, full, name)
        pieces[planned.key(name)] = Piece(value.dtype, tuple(value.shape), partial(value_of, model, full, name))
    config = _config(model, planned, ranks, start)
    metadata = {"format": "pt"} | ({FROZEN: json.dumps(dict(frozen))} if frozen else {})
    write_tensors(folder / WEIGHTS, pieces, metadata)
    write_whole(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    sizes = {
        name: sum(prod(p.shape) * p.dtype.itemsize for p in map(pieces.get, s.keys) if p) for name, s in planned.slots.items()
    }
    return Written(ranks, planned.saved_modules, planned.alongside, sizes, (folder / WEIGHTS).stat().st_size, planned, config)


def value_of(model: nn.Module, full: Mapping[str, Tensor], name: str) -> Tensor:
    """The value of a tensor that is saved in full.

    Args:
        model: The plain model.
        full: Values by name, for `write_adapter`.
        name: A parameter or buffer.

    Returns:
        That of ``full``, also under the name of a parameter tied to it, or else that of the model; on the CPU.

    Raises:
        ExportError: There is none, or it has another shape.
    """
    own, param = model.state_dict()[name], dict(model.named_parameters(remove_duplicate=False)).get(name)
    names = [name, *(aliases(model, name) if param is not None else [])]
    value = next((full[n] for n in names if n in full), own)
    if value.is_meta:
        raise ExportError(f"'{name}' is in a module that is saved in full; its value must be given too")
    if value.shape != own.shape:
        raise ExportError(f"'{name}' is {tuple(value.shape)}; expected {tuple(own.shape)} as in the model")
    return value.detach().cpu().contiguous()


def _factor(low_rank: Mapping[str, Factors], slot: Slot, which: int, dtype: torch.dtype | None) -> Tensor:
    """PEFT's A (0) or B (1) of a change, made when it is written."""
    made = slot.encode(low_rank[slot.name])[which].detach().to("cpu", dtype).contiguous()
    if not all_finite(made):
        raise ExportError(
            f"the factors of '{slot.name}' have values that are NaN, or that {made.dtype} cannot hold: the run has diverged, "
            "or needs a wider dtype"
        )
    return made


def _stands_alone(model: nn.Module, name: str, adapted: set[str], full: Collection[str]) -> bool:
    """Whether a parameter is saved alongside: a bias, or one whose module cannot be saved in full."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute == "bias" and isinstance(module, nn.Linear) and f"{owner}.weight" not in full:
        return True
    if any(m == owner or m.startswith(f"{owner}.") for m in adapted) or not owner:
        return True
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def _config(model: nn.Module, planned: AdapterPlan, ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parameters = [name for name, _ in model.named_parameters()]
    by_module = {slot.module for slot in planned.slots.values() if not slot.by_parameter}
    by_parameter = {name for name, slot in planned.slots.items() if slot.by_parameter}
    adapted = {slot.module for slot in planned.slots.values()}
    default, special = names.rank_pattern({slot.target: ranks[name] for name, slot in planned.slots.items()})
    stored_in_out = any(
        slot.kind == "linear" and not isinstance(model.get_submodule(slot.module), nn.Linear) for slot in planned.slots.values()
    )
    saved = names.modules_to_save(planned.saved_modules, modules, adapted) if planned.saved_modules else None
    biased = {name.rpartition(".")[0] for name in planned.alongside if name.endswith(".bias")}
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
        "bias": "none" if not biased else "lora_only" if biased <= adapted else "all",
        "fan_in_fan_out": stored_in_out,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _task(model: nn.Module) -> str | None:
    """The task, for which PEFT has a class of its own, where that class calls the model as it must be called."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None  # PEFT's classes for generation pass token ids to everything
    if not (type(model).__name__.endswith(_GENERATES) and hasattr(model, "prepare_inputs_for_generation")):
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _ties_embeddings(model: nn.Module) -> bool:
    """Whether the head is tied to the embedding in the way PEFT supports: every other module of that weight is a Linear."""
    config = getattr(model, "config", None)
    if not (getattr(config, "tie_word_embeddings", False) and getattr(model, "_tied_weights_keys", None)):
        return False
    try:
        weight = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    except NotImplementedError:  # as transformers says that it knows none
        return False
    every = [module for _, module in model.named_modules(remove_duplicate=False) if getattr(module, "weight", None) is weight]
    return sum(not isinstance(module, nn.Linear) for module in every) == 1
