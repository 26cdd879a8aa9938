"""Weights that transformers saves under other names than the model has: the Trainer loads a file by the names in it.

``save_pretrained`` writes the names and forms of older versions (the experts of Mixtral and Qwen one by one, ViT's layers), and
``from_pretrained`` knows them. The Trainer's own loading does not, and goes on with the weights the model has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lingrad.errors import CheckpointError, optional


def load_renamed(model: nn.Module, folder: Path) -> None:
    """Load what the Trainer has left out of a checkpoint; nothing where its names are those of the model.

    Args:
        model: The model that the Trainer has loaded the checkpoint into.
        folder: The checkpoint.

    Raises:
        CheckpointError: The checkpoint has no value for some weight of the model.
    """
    missing = _missing(model, _names(folder))
    if not missing:
        return
    load: Any = getattr(type(model), "from_pretrained", None)
    if load is None or getattr(model, "is_quantized", False):
        raise CheckpointError(f"the checkpoint '{folder}' has no '{missing[0]}', which the model has")
    try:  # of what can be wrong in a folder every library it passes through has its own error
        read, told = load(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint '{folder}' has no '{missing[0]}', and cannot be read: {error}") from error
    state: dict[str, Tensor] = read.state_dict()
    lost = [name for name in missing if name not in state or name in told["missing_keys"]]
    if lost:
        raise CheckpointError(f"the checkpoint '{folder}' has no '{lost[0]}', which the model has")
    model.load_state_dict(state, strict=False)


def _names(folder: Path) -> set[str] | None:
    """The names in a checkpoint's safetensors; None where there are none."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        safetensors = optional("safetensors", "reading a checkpoint of the Trainer", "hf")
        with safetensors.safe_open(whole, "pt") as file:
            return set(file.keys())
    return set(json.loads(index.read_text())["weight_map"]) if index.is_file() else None


def _missing(model: nn.Module, names: set[str] | None) -> list[str]:
    """What a model saves and a file lacks, but for what is tied to something in it, or need not be saved."""
    if names is None:
        return []
    own = model.state_dict()
    known = {tensor.data_ptr() for name, tensor in own.items() if name in names}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return [name for name, t in own.items() if name not in names and t.data_ptr() not in known and name not in ignored]
