"""Model folders computed from another one, shard by shard and tensor by tensor: with an adapter merged, or decayed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from lingrad.console import Tick
from lingrad.convert.composed import open_folder
from lingrad.convert.tensors import params_of, tied_names
from lingrad.deprecated import renamed_keywords
from lingrad.errors import CheckpointError, DataError
from lingrad.files.atomic import new_folder
from lingrad.files.model_folder import INDEX, WEIGHTS, ModelFolder
from lingrad.files.reading import all_finite
from lingrad.files.tensorfile import Piece, write_tensors
from lingrad.models import open_model
from lingrad.peft.read import read_adapter

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


@renamed_keywords("lingrad.convert.merge", base="start")
def merge(start: str | Path, adapter: str | Path, out: str | Path, *, tick: Tick | None = None) -> Path:
    """Write the plain model that PEFT's ``merge_and_unload`` makes of a starting model and an adapter, to the bit in float32.

    Weights are read and written one by one: the adapter and the largest weight are in memory. Where transformers wrote fused
    experts one by one, those of a layer are.

    Args:
        start: The folder of the model that the adapter is for.
        adapter: The adapter's folder, a LoRA with its weights in safetensors.
        out: The folder of the merged model; must not exist. Its files are like those of ``start``; config and tokenizer are
            copied.
        tick: Called after each tensor: how many are done, of how many, its name.

    Returns:
        The folder.

    Raises:
        DataError: A folder cannot be used, ``out`` exists or cannot be written.
        CheckpointError: The adapter is for another model, or changes a weight that its files do not have.
    """
    ModelFolder(Path(start))  # what is no model's folder is said first
    model = open_model(str(Path(start).absolute()))
    folder = open_folder(Path(start), model)
    found = read_adapter(Path(adapter), model)
    params = params_of(model, folder.names)
    known = {*params.values()}
    tied = tied_names(model, folder)
    aliases = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(aliases[param]) for param in known if param in aliases}
    for name in (*found.low_rank, *found.full):
        if name not in known and id(aliases.get(name)) not in stored:
            raise CheckpointError(
                f"the adapter changes '{name}', and no file of '{start}' contains it; give the model it was made for"
            )
    if tied & {name for name, param in params.items() if param in found.low_rank}:
        raise CheckpointError(f"the adapter changes one of two tied weights, and '{start}' stores both")

    saved = {id(aliases[param]): param for param in found.full if param in aliases}

    def merged(name: str) -> Tensor:
        weight, param = folder.read(name), params[name]
        if param not in found.low_rank and param not in found.full:
            param = saved.get(id(aliases.get(param)), "")  # the adapter may have it under another of its names
            if not param:
                return weight
        changed = found.apply(param, weight)
        if not all_finite(changed):
            raise DataError(f"'{name}' of '{start}' with the adapter has elements that are not finite")
        return changed

    return write_model(folder, Path(out), merged, tick)


def decayed_weight(name: str, weight: Tensor, factor: float) -> Tensor:
    """A weight multiplied by what decoupled decay has made of it.

    Args:
        name: Its name, for messages.
        weight: The weight.
        factor: The factor; 1 leaves the weight as it is.

    Returns:
        In the weight's dtype, rounded once.

    Raises:
        DataError: The weight is stored as integers.
    """
    if factor == 1.0:
        return weight
    if not weight.is_floating_point():
        raise DataError(f"'{name}' is stored as {weight.dtype}, as in a quantised model, and cannot be decayed")
    return (weight.double() * factor).to(weight.dtype)


def write_model(template: ModelFolder, out: Path, make: Callable[[str], Tensor], tick: Tick | None = None) -> Path:
    """Write a model folder with the same files as another one and new values.

    Args:
        template: The other one.
        out: The folder; must not exist.
        make: Name, of the parameter where it is stored in parts -> value, of the dtype and shape in ``template``.
        tick: Called after each tensor.

    Returns:
        The folder.

    Raises:
        DataError: It exists or cannot be written.
    """
    parts = {part.name: (param, part) for param, found in template.parts.items() for part in found}
    total, done = sum(len(file.entries) for file in template.files.values()), 0
    whole: dict[str, Tensor] = {}  # of one module: its experts' tensors take turns in the files

    def value(name: str) -> Tensor:
        if name not in parts:
            return make(name)
        param, part = parts[name]
        if param not in whole:
            if {other.rpartition(".")[0] for other in whole} - {param.rpartition(".")[0]}:
                whole.clear()
            whole[param] = make(param).contiguous()
        return part.of(whole[param]).contiguous()

    def count(name: str) -> Tensor:
        nonlocal done
        tensor, done = value(name), done + 1
        if tick is not None:
            tick(done, total, name)
        return tensor

    try:
        with new_folder(out) as folder:
            for name, file in template.files.items():
                pieces = {key: Piece(entry.dtype, entry.shape, partial(count, key)) for key, entry in file.entries.items()}
                write_tensors(folder / name, pieces, file.metadata)
            for source in sorted(template.path.iterdir()):
                index = source.name.endswith(".index.json") and (
                    WEIGHTS in template.files or source.name != INDEX
                )  # it lists other files
                if source.is_file() and source.suffix not in _WEIGHTS and not index:
                    shutil.copyfile(source, folder / source.name)
    except OSError as error:
        raise DataError(f"cannot write '{out}': {error}; nothing is left of it") from error
    return out
