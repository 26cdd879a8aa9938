"""The adapter next to a model that a trainer saves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from torch import nn

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import LingradError, warn_caller
from lingrad.files.model_folder import TOKENIZER
from lingrad.peft.export import export
from lingrad.peft.source import Changes, Exported
from lingrad.tensors import is_sharded

ADAPTER = "adapter"  # a folder inside that of the saved model


def save_adapter(
    optimizer: SubspaceOptimizer, model: nn.Module, folder: Path, no_adapter: str, options: Mapping[str, Any], *, writes: bool
) -> None:
    """Write an adapter into the folder of a saved model, or warn why there is none.

    Args:
        optimizer: The run, in adapter mode.
        model: The trainer's model.
        folder: The folder, with the model in it.
        no_adapter: Why there can be none, if that is known.
        options: Options of `lingrad.peft.export`.
        writes: Whether this process writes; where the model is sharded, the others are needed too.
    """
    sharded = any(is_sharded(param) for param in model.parameters())
    gathered: Changes = {}
    if sharded and not no_adapter:
        try:
            gathered = optimizer.changes()
        except LingradError as error:  # in every process the same
            no_adapter = str(error)
    if not writes:
        return
    with _own_forward(model):
        what = (_read_back(optimizer, model, folder), gathered) if sharded and not no_adapter else optimizer
        _write(what, folder / ADAPTER, no_adapter, options)


def _read_back(optimizer: SubspaceOptimizer, model: nn.Module, folder: Path) -> nn.Module:
    """The plain model, all of it, from the folder that it was just saved to; what the run trains requires gradients."""
    load: Any = getattr(type(model).__bases__[-1], "from_pretrained")  # noqa: B009
    plain: nn.Module = load(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    trained = {name for group in optimizer.param_groups for name in group["param_names"]}
    for name, param in plain.named_parameters():
        param.requires_grad_(name in trained)
    return plain.train(model.training)


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Remove a forward by which accelerate (autocast) or TRL has replaced the model's, which PEFT does not use."""
    replaced = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            vars(model)["forward"] = replaced


def _write(what: Exported, folder: Path, no_adapter: str, options: Mapping[str, Any]) -> None:
    """Export to a temporary folder, then replace the adapter of an earlier save; warn where there can be no adapter."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    why = no_adapter
    if not why and folder.exists() and not (folder / "adapter_config.json").is_file():
        why = f"'{folder}' is not an adapter's folder, and is not overwritten"
    if not why:
        try:
            has_tokenizer = any((folder.parent / name).is_file() for name in TOKENIZER)
            export(what, fresh, **{"quiet": True, "tokenizer": folder.parent if has_tokenizer else None, **options})
        except LingradError as error:
            why = str(error)
    if (folder / "adapter_config.json").is_file():  # written by an earlier save
        shutil.rmtree(folder)
    if why:
        warn_caller(
            f"'{folder.parent}' has the full model, but no adapter: {why}. `lingrad convert START {quote(str(folder.parent))} "
            "--out DIR` makes one from the weights before and after training, and reports how close it is",
            UserWarning,
        )
    else:
        fresh.rename(folder)
