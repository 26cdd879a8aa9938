"""Weights that transformers saves under other names than the model's own: the Trainer loads a file by the names in it.

``save_pretrained`` writes the names and forms of older versions (the experts of Mixtral and Qwen one by one, ViT's layers), and
``from_pretrained`` reads them. The Trainer's own loading does not, and continues with the weights that the model has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lingrad.errors import CheckpointError
from lingrad.files.model_folder import open_weights


def load_renamed(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint that the Trainer has not loaded; none where its names are those of the model.

    Args:
        model: The model that the Trainer has loaded the checkpoint into.
        folder: The checkpoint.

    Raises:
        CheckpointError: The checkpoint has no value for a weight of the model.
        DataError: Its weight files are damaged.
    """
    files = open_weights(folder)
    missing = _missing(model, {name for file in files.values() for name in file.entries}) if files else []
    if not missing:
        return
    load: Any = getattr(type(model), "from_pretrained", None)
    if load is None or getattr(model, "is_quantized", False):
        raise CheckpointError(f"the checkpoint '{folder}' has no '{missing[0]}', which the model has")
    try:
        read, info = load(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # each library that reads a part of the folder has its own errors
        raise CheckpointError(f"the checkpoint '{folder}' has no '{missing[0]}', and cannot be read: {error}") from error
    state: dict[str, Tensor] = read.state_dict()
    lost = [name for name in missing if name not in state or name in info["missing_keys"]]
    if lost:
        raise CheckpointError(f"the checkpoint '{folder}' has no '{lost[0]}', which the model has")
    model.load_state_dict(state, strict=False)


def _missing(model: nn.Module, names: set[str]) -> list[str]:
    """The names of a model that a checkpoint lacks, without those that are tied to one in it, or need not be saved."""
    own = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in own.items() if name in names}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return [name for name, t in own.items() if name not in names and t.data_ptr() not in loaded and name not in ignored]
