"""The logits of two models, with an adapter on one of them, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lingrad.errors import ExportError, optional
from lingrad.models import load_model
from lingrad.peft.report import OutputComparison
from lingrad.peft.verify import make_inputs


def compare_logits(folder: Path, base: Path, tuned: Path) -> OutputComparison:
    """Load both models into memory, START with the adapter through PEFT, and compare their logits on random tokens.

    Args:
        folder: The adapter's folder.
        base: The base model's.
        tuned: The tuned model's.

    Returns:
        What was found.
    """
    peft: Any = optional("peft", "comparing logits", "hf")
    model = load_model(tuned)
    inputs, expected = make_inputs(None, model), logits_of(model)
    del model  # before the next one is loaded
    found = logits_of(peft.PeftModel.from_pretrained(load_model(base), str(folder)))
    what = "" if inputs is None else inputs.what
    return OutputComparison(what, float((found - expected).abs().max()), float(expected.abs().max()))


def logits_of(model: Any) -> Tensor:
    """The logits of a model on 2 x 16 random tokens, or as many as it takes; hidden states where it has no head.

    Args:
        model: The model.

    Returns:
        The logits, float64.

    Raises:
        ExportError: The model does not read tokens alone, or fails.
    """
    inputs = make_inputs(None, model)
    try:
        found = None if inputs is None else inputs.run(model)
    except Exception as error:  # the model's own code may raise any exception
        raise ExportError(
            f"logits cannot be compared, {type(model).__name__} fails on random tokens: {error}; leave logits out"
        ) from error
    if found is None:
        raise ExportError(f"logits cannot be compared, {type(model).__name__} does not read tokens alone; leave logits out")
    return found
