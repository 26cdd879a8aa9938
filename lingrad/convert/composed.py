"""Model folders that transformers wrote: experts one by one, modules by earlier names, read as the parameters of the model."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from lingrad.convert.tensors import params_of
from lingrad.files.model_folder import ModelFolder, TensorPart


def open_folder(path: Path, model: nn.Module) -> ModelFolder:
    """A model folder, with the tensors that are parts of a parameter, or have another name than it, read as the parameter.

    Args:
        path: The folder, as ``save_pretrained`` writes it, or with the model's own names.
        model: The model of its config, on the meta device.

    Returns:
        The folder. Tensors that cannot be told to be parts of a parameter keep their names.

    Raises:
        DataError: It is not a model folder, or is damaged.
    """
    folder = ModelFolder(path)
    stored = {*params_of(model, folder.names).values()}
    left = {*folder.names}
    for name, param in model.state_dict().items():
        if name in stored or 0 in param.shape:
            continue
        found = _parts(model, name, tuple(param.shape))
        fits = all(part.name in left and folder.entry(part.name).shape == part.shape for part in found)
        if found and fits and len({folder.entry(part.name).dtype for part in found}) == 1:
            left -= {part.name for part in found}
            folder.compose(name, tuple(param.shape), found)
    return folder


def _parts(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[TensorPart, ...]:
    """Where the elements of a parameter are in the tensors that transformers writes for it; none where it cannot be said."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        # as transformers splits, transposes and renames the numbers of the elements, so it does their values
        numbers = torch.arange(prod(shape), dtype=torch.int32 if prod(shape) < 2**31 else torch.int64, device="cpu").view(shape)
        written: dict[str, Tensor] = revert_weight_conversion(model, {name: numbers})
    except Exception:  # a transformers without it, or one of its operations that asks for more than one parameter
        return ()
    found = [_part(key, value) for key, value in written.items()]
    parts = tuple(part for part in found if part is not None)
    is_whole = len(parts) == len(found) and sum(value.numel() for value in written.values()) == numbers.numel()
    return parts if is_whole and [part.name for part in parts] != [name] else ()


def _part(name: str, numbers: Tensor) -> TensorPart | None:
    """The part that has these elements; None where they are not at regular distances."""
    if not numbers.numel():
        return None
    first = numbers.flatten()[0]
    strides = tuple(int(numbers.select(i, 1).flatten()[0] - first) if n > 1 else 1 for i, n in enumerate(numbers.shape))
    part = TensorPart(name, tuple(numbers.shape), strides, int(first))
    expected = first
    for i, (size, stride) in enumerate(zip(part.shape, strides, strict=True)):
        steps = torch.arange(size, dtype=numbers.dtype, device="cpu") * stride
        expected = expected + steps.view(-1, *(1 for _ in part.shape[i + 1 :]))
    return part if min(strides, default=0) >= 0 and torch.equal(expected.view(part.shape), numbers) else None
