"""The outputs of two models, with an adapter on one of them, beside each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lingrad.errors import ExportError, in_short, optional
from lingrad.models import load_model
from lingrad.peft.outputs import Inputs, Outputs, compare, make_inputs
from lingrad.peft.report import OutputComparison


def compare_logits(folder: Path, base: Path, tuned: Path) -> OutputComparison:
    """Load both models into memory, START with the adapter through PEFT, and compare their outputs on random inputs.

    Args:
        folder: The adapter's folder.
        base: The base model's.
        tuned: The tuned model's.

    Returns:
        What was found in the output that differs most.

    Raises:
        ExportError: No inputs are known for the model, a model fails, or they have other outputs, or NaN.
    """
    peft: Any = optional("peft", "comparing logits", "hf")
    model = load_model(tuned)
    inputs = _inputs(model)
    expected = outputs_of(model, inputs)
    del model  # before the next one is loaded
    found = outputs_of(peft.PeftModel.from_pretrained(load_model(base), str(folder)), inputs)
    compared = compare(inputs, expected, found)
    for name, one in compared.items():
        if math.isnan(one.difference):
            raise ExportError(f"logits cannot be compared, on {inputs.what} they are NaN in '{name}'; leave logits out")
    return max(compared.values(), key=_share)


def _share(found: OutputComparison) -> float:
    return found.difference / found.largest if found.largest else found.difference


def outputs_of(model: Any, inputs: Inputs | None = None) -> Outputs:
    """The outputs of a model: its logits, hidden states where it has no head, and whatever else it returns.

    Args:
        model: The model.
        inputs: What it is run on; None makes two rows of random ones, of 16 tokens where it reads tokens.

    Returns:
        Those of floating-point numbers by name, in float64.

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
    if not found:
        raise ExportError(f"logits cannot be compared, {type(model).__name__} returns no numbers; leave logits out")
    return found


def _inputs(model: Any) -> Inputs:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT, whose forward takes anything
    found = make_inputs(None, plain)
    if found is None:
        raise ExportError(f"logits cannot be compared, no inputs are known for {type(plain).__name__}; leave logits out")
    return found
