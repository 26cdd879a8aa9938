"""An adapter that was written, read again: by PEFT, for its structure; against both models, for its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingrad.convert.tensors import Pair
from lingrad.convert.work import Record
from lingrad.errors import ExportError, optional
from lingrad.files.model_folder import ModelFolder
from lingrad.files.tensorfile import TensorFile
from lingrad.peft.slots import Slot, slots
from lingrad.peft.verify import make_inputs
from lingrad.peft.write import WEIGHTS


class Residuals(NamedTuple):
    """What factors leave of a change.

    Args:
        plain: |TUNED - (BASE + B A)|_F / |TUNED - BASE|_F.
        without_decay: |TUNED - (kept * BASE + B A)|_F / |TUNED - BASE|_F.
        dtype: The dtype the factors are in.
    """

    plain: float
    without_decay: float
    dtype: torch.dtype


def check_structure(folder: Path, model: nn.Module, low_rank: Sequence[str]) -> dict[str, Slot]:
    """Let PEFT build the adapter from its config, and compare the tensors it expects with those in the file.

    Args:
        folder: The adapter's folder.
        model: The plain model on the meta device; changed.
        low_rank: The parameters with factors.

    Returns:
        Where the factors of each are.

    Raises:
        ExportError: They differ.
    """
    found = slots(model, low_rank)
    peft: Any = optional("peft", "checking an adapter", "hf")
    config = peft.PeftConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, config)
    expected = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(adapted).items()}
    written = {key: entry.shape for key, entry in TensorFile(folder / WEIGHTS).entries.items()}
    if expected != written:
        odd = sorted(key for key in {*expected, *written} if expected.get(key) != written.get(key))[0]
        raise ExportError(
            f"PEFT expects '{odd}' of shape {expected.get(odd)}, and {written.get(odd)} was written; please report this model"
        )
    return found


def residuals(folder: Path, slot: Slot, pair: Pair, record: Record, base: ModelFolder, tuned: ModelFolder) -> Residuals:
    """What the factors in a file leave of a change, entry by entry in float64.

    Args:
        folder: The adapter's folder.
        slot: Where the factors are.
        pair: The tensor.
        record: What was found of it.
        base: One folder.
        tuned: The other.

    Returns:
        The residuals.
    """
    file = TensorFile(folder / WEIGHTS)
    a, b = (file.read(key) for key in slot.keys)
    factors = pair.turned(slot.decode(a, b)).to(dtype=torch.float64)
    change = pair.difference(base, tuned)
    found = []
    for kept in dict.fromkeys((1.0, record.kept)):
        change.kept = kept
        found.append(change.rest(factors.left, factors.right).energy ** 0.5 / record.norm)
    return Residuals(found[0], found[-1], a.dtype)


def compare_logits(folder: Path, base: Path, tuned: Path) -> tuple[float, float]:
    """Load both models whole, BASE with the adapter through PEFT, and compare their logits on random tokens.

    Args:
        folder: The adapter's folder.
        base: The base model's.
        tuned: The tuned model's.

    Returns:
        The largest difference of a logit, and the largest logit.
    """
    peft: Any = optional("peft", "comparing logits", "hf")
    outputs = []
    for path in (tuned, base):
        model = load_model(path)
        if path is base:
            model = peft.PeftModel.from_pretrained(model, str(folder))
        outputs.append(logits_of(model))
    theirs, ours = outputs
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def load_model(path: Path) -> Any:
    """The model of a folder, in the dtype it was saved in; nothing is downloaded, and no code of the folder's is run."""
    transformers: Any = optional("transformers", "loading a model", "hf")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    return cls.from_pretrained(path, dtype="auto", local_files_only=True, use_safetensors=True)


def logits_of(model: Any) -> Tensor:
    """What a model of tokens says to 2 x 16 random ones, or as many as it takes: logits, or hidden states without a head.

    Args:
        model: The model.

    Returns:
        The numbers, in float64.

    Raises:
        ExportError: It is no model of tokens, or fails.
    """
    inputs = make_inputs(None, model)
    try:
        found = None if inputs is None else inputs.run(model)
    except Exception as error:  # what a model does with tokens that are only random is anybody's guess
        raise ExportError(
            f"logits cannot be compared, {type(model).__name__} fails on random tokens: {error}; leave logits out"
        ) from error
    if found is None:
        raise ExportError(f"logits cannot be compared, {type(model).__name__} does not read tokens alone; leave logits out")
    return found
