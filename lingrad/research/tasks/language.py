"""What the tasks of language models share: the model, by name or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import SpecError, require
from lingrad.models import LLAMAS, LlamaShape, build_llama, load_model, next_token_loss

PRESETS = ("small", *LLAMAS)


def check_task(kind: str, task: Any, *sizes: str) -> None:
    """Check the sizes and the model of a task.

    Args:
        kind: The task's name in plans.
        task: The task, with ``model``, ``length`` and, where it is one of the sizes, ``hidden``.
        *sizes: Fields that must be 1 or more.

    Raises:
        SpecError: One of them is wrong.
    """
    for option in sizes:
        value = getattr(task, option)
        require(value >= 1, option, f"task '{kind}': '{option}' must be 1 or more, not {value}")
    require(task.length >= 2, "length", f"task '{kind}': 'length' must be 2 or more tokens, not {task.length}")
    if "hidden" in sizes:
        require(task.hidden % 32 == 0, "hidden", f"task '{kind}': 'hidden' must be a multiple of 32, not {task.hidden}")
    presets = PRESETS if "hidden" in sizes else ()
    if task.model not in presets and not is_path(task.model):
        known = f"known: {', '.join(presets)}, or a folder, ./model" if presets else "expected a folder, ./model"
        raise SpecError(f"task '{kind}': there is no model '{task.model}'; {known}", option="model")


def is_path(name: str) -> bool:
    """Whether a name is that of a folder, with a slash or a dot, so that it is no preset."""
    return Path(name).name != name or name.startswith(".")


def build_model(task: Any, vocabulary: int, *, seed: int, dtype: torch.dtype) -> nn.Module:
    """The model of a task: a Llama from nothing, or that of a folder.

    Args:
        task: The task, with ``model``, ``folder``, ``length``, ``hidden`` and ``layers``.
        vocabulary: Number of token ids that the data has.
        seed: Of random weights.
        dtype: Of the weights.

    Returns:
        The model. One by name of `LLAMAS` has as many token ids as it has, or more where the data has more.
    """
    if task.model not in PRESETS:
        model: nn.Module = load_model(task.folder / task.model).to(dtype)
        return model
    if task.model == "small":
        inner = 8 * round(task.hidden * 8 / 3 / 8)
        shape = LlamaShape(vocabulary, task.hidden, inner, task.layers, max(1, task.hidden // 32), task.length)
    else:
        known = vars(LLAMAS[task.model])
        shape = LlamaShape(**{**known, "vocabulary": max(known["vocabulary"], vocabulary)})
    return build_llama(shape, seed=seed, dtype=dtype)


def window_loss(model: nn.Module, ids: Tensor, *, length: int, count: int, rows: int) -> float:
    """The loss on windows spread evenly over a text.

    Args:
        model: A causal language model of transformers.
        ids: The text's token ids, int64 [N], ``length`` or more.
        length: Tokens of a window.
        count: How many windows, at most as many as do not overlap.
        rows: How many at once.

    Returns:
        Nats per token.
    """
    starts = torch.linspace(0, len(ids) - length, min(count, len(ids) // length)).long().tolist()
    windows = torch.stack([ids[start : start + length] for start in starts])
    device = next(model.parameters()).device
    parts = windows.split(rows)  # the last may be smaller
    return sum(len(part) * next_token_loss(model, part.to(device)).item() for part in parts) / len(windows)
