"""All outputs of a model and of an adapter, compared number by number on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lingrad import models
from lingrad.errors import DataError, ExportError, in_short
from lingrad.peft.bare import devices_of
from lingrad.peft.report import OutputComparison
from lingrad.peft.verify import LoadedAdapter

Outputs = dict[str, Tensor]  # by name: that of the output, or where it is in one that is nested

SEED = 0
ROWS, LENGTH = 2, 16  # of generated token ids


@dataclass(frozen=True)
class Inputs:
    """What models are run on.

    Args:
        args: Positional arguments.
        kwargs: Arguments by name.
        what: A description.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    what: str

    def run(self, model: nn.Module) -> Outputs:
        """The outputs of a model in eval mode, without gradients; its mode and the random generators are left as they were.

        Args:
            model: The model.

        Returns:
            Every output of floating-point numbers, in float64 on the CPU; logits first.
        """
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=devices_of(model)):
                found = dict(_outputs("", model(*self.args, **self.kwargs)))
        finally:
            for module, mode in modes.items():
                module.training = mode
        first = sorted(found, key=lambda name: name != "logits")
        return {name: found[name].detach().double().cpu() for name in first}


def make_inputs(inputs: Any, model: nn.Module) -> Inputs | None:
    """Inputs as they were given, or random ones for a model of transformers.

    Args:
        inputs: A tensor, a tuple of positional arguments, a mapping of named ones, or None.
        model: The model.

    Returns:
        The inputs; None where none were given and none can be generated.
    """
    if isinstance(inputs, Mapping):
        return Inputs((), dict(inputs), "the inputs given")
    if isinstance(inputs, tuple):
        return Inputs(inputs, {}, "the inputs given")
    if inputs is not None:
        return Inputs((inputs,), {}, "the inputs given")
    # without a padding token a classifier does not know where rows end, and takes one at a time
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    rows = 1 if padding is None and type(model).__name__.endswith("ForSequenceClassification") else ROWS
    try:
        found = models.make_inputs(model, rows=rows, length=LENGTH, seed=SEED)
    except DataError:
        return None
    names = [name for name in found if name not in models.TOKENS]
    return Inputs((), found, f"random {', '.join(found)}" if names else f"{rows} x {LENGTH} random token ids")


def compare_outputs(inputs: Inputs, trained: nn.Module, adapted: LoadedAdapter) -> dict[str, OutputComparison]:
    """Compare the outputs of the trained model with those of the adapter.

    Args:
        inputs: What to run them on.
        trained: The trained model.
        adapted: The adapter, loaded by PEFT.

    Returns:
        What was found, for each output; empty where the trained model gives no tensor of numbers.

    Raises:
        ExportError: A model does not run on the inputs, or PEFT's gives other outputs, or one of another shape.
    """
    try:
        expected = inputs.run(trained)
    except Exception as error:  # a model may raise any exception
        raise ExportError(f"{type(trained).__name__} does not run on {inputs.what}: {in_short(error)}; pass inputs=") from error
    if not expected:
        return {}
    try:
        with adapted.without_originals():
            got = inputs.run(adapted.model)
        with adapted.without():
            before = inputs.run(adapted.model)
    except Exception as error:  # a model may raise any exception
        raise ExportError(
            f"{type(trained).__name__} with the adapter does not run through PEFT on {inputs.what}: {in_short(error)}. The "
            "model treats one of the layers as PEFT's wrapper cannot be treated; leave that layer out by a rule: 'none'"
        ) from error
    return compare(inputs, expected, got, before)


def compare(inputs: Inputs, expected: Outputs, found: Outputs, before: Outputs | None = None) -> dict[str, OutputComparison]:
    """Compare outputs that two models gave.

    Args:
        inputs: What the models were run on.
        expected: The trained model's outputs, of any shapes.
        found: The adapter's.
        before: Those without the adapter; None where they were not computed.

    Returns:
        What was found, for each output; where both are the same infinity, they do not differ.

    Raises:
        ExportError: They have other names or shapes.
    """
    shapes = [{name: value.shape for name, value in outputs.items()} for outputs in (expected, found, before or expected)]
    if shapes != shapes[:1] * 3:
        raise ExportError("PEFT's model does not give outputs of the trained model's names and shapes")
    return {
        name: OutputComparison(
            inputs.what,
            _apart(found[name], value),
            float(torch.where(value.isinf(), 0.0, value.abs()).max()),
            None if before is None else _apart(before[name], value),
        )
        for name, value in expected.items()
    }


def _apart(one: Tensor, other: Tensor) -> float:
    return float(torch.where(one == other, 0.0, (one - other).abs()).max())


def _outputs(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    """Its tensors of floating-point numbers, at any depth."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield name, output
    elif isinstance(output, Mapping | list | tuple):
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        for key, value in items:
            yield from _outputs(f"{name}.{key}" if name else str(key), value)
