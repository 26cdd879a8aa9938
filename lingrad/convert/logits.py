"""The logits of two models, with an adapter on one of them, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lingrad.errors import ExportError, in_short, optional
from lingrad.models import load_model
from lingrad.peft.report import OutputComparison
from lingrad.peft.verify import Inputs, make_inputs


def compare_logits(folder: Path, base: Path, tuned: Path) -> OutputComparison:
    """Load both models into memory, START with the adapter through PEFT, and compare their logits on random inputs.

    Args:
        folder: The adapter's folder.
        base: The base model's.
        tuned: The tuned model's.

    Returns:
        What was found.
    """
    peft: Any = optional("peft", "comparing logits", "hf")
    model = load_model(tuned)
    inputs = _inputs(model)
    expected = logits_of(model, inputs)
    del model  # before the next one is loaded
    found = logits_of(peft.PeftModel.from_pretrained(load_model(base), str(folder)), inputs)
    return OutputComparison(inputs.what, float((found - expected).abs().max()), float(expected.abs().max()))


def logits_of(model: Any, inputs: Inputs | None = None) -> Tensor:
    """The logits of a model; hidden states where it has no head.

    Args:
        model: The model.
        inputs: What it is run on; None makes two rows of random ones, of 16 tokens where it reads tokens.

    Returns:
        The logits, float64.

    Raises:
        ExportError: No inputs are known for the model, or it fails.
    """
    inputs = _inputs(model) if inputs is None else inputs
    try:
        found = inputs.run(model)
    except Exception as error:  # the model's own code may raise any exception
        raise ExportError(
            f"logits cannot be compared, {type(model).__name__} fails on {inputs.what}: {in_short(error)}; leave logits out"
        ) from error
    if found is None:
        raise ExportError(f"logits cannot be compared, {type(model).__name__} returns no numbers; leave logits out")
    return found


def _inputs(model: Any) -> Inputs:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT, whose forward takes anything
    found = make_inputs(None, plain)
    if found is None:
        raise ExportError(f"logits cannot be compared, no inputs are known for {type(plain).__name__}; leave logits out")
    return found
