"""Adapters whose names are those of an earlier transformers, before it renamed modules and fused experts.

transformers 5 keeps a list of what it renamed and fused, and PEFT applies it to an adapter that it loads:
w1 and w3 of Mixtral's experts become factors of ``gate_up_proj``, block by block. Here PEFT's own conversion does it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from lingrad.errors import CheckpointError, in_short
from lingrad.files.tensorfile import TensorFile
from lingrad.peft.slots import PREFIX

# what the conversion changes of a config
_CHANGED = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")


def owners(keys: Iterable[str]) -> list[str]:
    """The modules, as they are called in the plain model, that the factors in a file belong to."""
    found: dict[str, None] = {}
    for key in sorted(keys):
        path, mark, _ = key.partition(".lora_")
        if mark:
            path = path.removeprefix(PREFIX)
            while path.endswith(".base_layer"):
                path = path.removesuffix(".base_layer")
            found[path] = None
    return list(found)


def renamed(
    model: nn.Module, config: Mapping[str, Any], file: TensorFile
) -> tuple[Mapping[str, Any], Iterable[str], Callable[[str], Tensor]]:
    """An adapter as it is named, and its experts fused, in the model at hand.

    Args:
        model: The plain model, on any device.
        config: The adapter's config.
        file: Its tensors; nothing is read of it where the model has every module that its factors name.

    Returns:
        The config, the keys, and what reads the tensor of a key.

    Raises:
        CheckpointError: The model lacks a module that the factors name, also under the name it has now.
    """
    modules = dict(model.named_modules())
    missing = next((owner for owner in owners(file.entries) if owner not in modules), None)
    if missing is None:
        return config, file.entries, file.read
    message = f"the adapter has factors for '{missing}', which the model does not have: it is for another model"
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as convert_tensors,
        )
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers as convert_config,
        )
    except ImportError:  # no PEFT, or one that knows no earlier names
        raise CheckpointError(
            f"{message}, or was saved with transformers 4, whose names are read where PEFT 0.21 or later is installed"
        ) from None
    theirs = LoraConfig(**{key: copy.deepcopy(value) for key, value in config.items() if key in _options(LoraConfig)})
    tensors = {key: file.read(key) for key in file.entries}
    try:
        convert_config(theirs, model, None)
        found = convert_tensors(model, theirs, tensors)
    except Exception as error:  # PEFT and transformers may raise any exception
        raise CheckpointError(f"{message}, or PEFT cannot rename its factors: {in_short(error)}") from error
    if any(owner not in modules for owner in owners(found)):
        raise CheckpointError(message)
    changed = {name: _plain(getattr(theirs, name)) for name in _CHANGED}
    return {**config, **changed}, found, lambda key: found[key].contiguous()


def _options(kind: type) -> set[str]:
    return {option.name for option in fields(kind)}


def _plain(value: Any) -> Any:
    """As JSON would have it."""
    return sorted(value) if isinstance(value, set) else value
