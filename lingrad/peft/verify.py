"""Adapters as PEFT loads them: their structure, weights and outputs, to be compared with what was trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad import models
from lingrad.errors import DataError, ExportError, in_short, optional
from lingrad.files.tensorfile import TensorFile
from lingrad.peft.bare import devices_of
from lingrad.peft.report import ChangedTensor, OutputComparison, ratio
from lingrad.peft.slots import PREFIX, Slot, slots
from lingrad.peft.write import WEIGHTS, AdapterPlan, Written

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

    def run(self, model: nn.Module) -> Tensor | None:
        """The outputs of a model in eval mode, without gradients; its mode and the random generators are left as they were."""
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=devices_of(model)):
                found = _tensor(model(*self.args, **self.kwargs))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return None if found is None else found.detach().double().cpu()


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


class LoadedAdapter:
    """An adapter that PEFT has loaded onto a model, with a wrapper exactly where the plan has one.

    Args:
        model: The starting model, plain; PEFT changes its structure, not its weights.
        folder: The adapter's folder.
        planned: Where the adapter should be.

    Raises:
        ExportError: PEFT did not load it, or put it elsewhere.
    """

    def __init__(self, model: nn.Module, folder: Path, planned: AdapterPlan) -> None:
        peft = optional("peft", "checking an adapter by PEFT", "hf")
        self.planned = planned
        with warnings.catch_warnings(), torch.random.fork_rng(devices=devices_of(model)):
            warnings.simplefilter("ignore")  # what they would say is checked below
            try:
                self.model: Any = peft.PeftModel.from_pretrained(model, str(folder)).eval()
            except Exception as error:  # PEFT may raise any exception
                raise ExportError(f"PEFT does not load the adapter: {in_short(error)}") from error
        self._check_wrappers()

    def delta(self, slot: Slot) -> Tensor:
        """B A as PEFT has it, in the weight's shape."""
        found: Tensor = self._layer(slot).get_delta_weight("default")
        return found.detach()

    def tensor(self, name: str) -> Tensor:
        """A tensor that was saved in full.

        Args:
            name: Its name in the plain model.

        Returns:
            The value that PEFT's model uses.

        Raises:
            ExportError: It has none.
        """
        for module in self.planned.saved_modules:
            if name.startswith(f"{module}."):
                wrapper = self._bare().get_submodule(module)
                saved: dict[str, Tensor] = wrapper.modules_to_save["default"].state_dict()
                attribute = name.removeprefix(f"{module}.")
                if attribute not in saved:
                    raise ExportError(f"PEFT's copy of '{module}' has no '{attribute}', so that it would be lost")
                return saved[attribute]
        alongside: Tensor = self._bare().get_parameter(self.planned.key(name).removeprefix(PREFIX))
        return alongside.detach()

    def without(self) -> Any:
        """A context in which the model is without the adapter."""
        return self.model.disable_adapter()

    def _bare(self) -> Any:
        return self.model.base_model.model

    def _layer(self, slot: Slot) -> Any:
        return self._bare().get_submodule(slot.module + ".base_layer" * slot.wrappers)

    def _check_wrappers(self) -> None:
        layers, saved = set(), set()
        for name, module in self._bare().named_modules():
            if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
                saved.add(name)
            if hasattr(module, "get_delta_weight"):
                layers.add(name)
        expected = {slot.module + ".base_layer" * slot.wrappers for slot in self.planned.slots.values()}
        for kind, found, meant in (("an adapter", layers, expected), ("a copy", saved, set(self.planned.saved_modules))):
            if found != meant:
                lost, more = sorted(meant - found), sorted(found - meant)
                where = f"none at {lost[0]}" if lost else f"one at {more[0]}, which has none"
                raise ExportError(f"PEFT puts {kind} of a weight in another module than lingrad wrote it for: {where}")


def compare_weights(
    loaded: LoadedAdapter,
    written: Written,
    now: Callable[[str], Tensor],
    start: Callable[[str], Tensor],
    decay: Mapping[str, float],
) -> tuple[list[ChangedTensor], float]:
    """Measure what PEFT's weights lack of the run's.

    Args:
        loaded: The adapter, loaded by PEFT.
        written: What was written.
        now: The run's weight by name, not rounded.
        start: The weight without the adapter by name.
        decay: The factor by which weight decay has multiplied it, by name.

    Returns:
        A row for each weight with factors, and the residual of all of them together.
    """
    rows, lost, total = [], 0.0, 0.0
    for name, slot in loaded.planned.slots.items():
        delta = loaded.delta(slot).double()
        before, made = start(name).to(delta.device).double(), now(name).to(delta.device).double()
        made = made - before
        size, left, norm = float(made.norm()), float((made - delta).norm()), float(before.norm())
        lost, total = lost + left**2, total + size**2
        rows.append(
            ChangedTensor(
                name,
                "low_rank",
                slot.layout.weight_shape,
                written.factor_bytes[name],
                rank=written.ranks[name],
                residual=ratio(left, size),
                decay=decay[name],
                change=size / norm if norm else None,
                full_rank=written.ranks[name] >= min(slot.layout.shape),
            )
        )
    return rows, ratio(lost, total) ** 0.5


def compare_outputs(inputs: Inputs, trained: nn.Module, adapted: LoadedAdapter) -> OutputComparison | None:
    """Compare the outputs of the trained model with those of the adapter.

    Args:
        inputs: What to run them on.
        trained: The trained model.
        adapted: The adapter, loaded by PEFT.

    Returns:
        What was found; None where the trained model gives no tensor of numbers.

    Raises:
        ExportError: A model does not run on the inputs, or PEFT's gives none, or one of another shape.
    """
    try:
        expected = inputs.run(trained)
    except Exception as error:  # a model may raise any exception
        raise ExportError(f"{type(trained).__name__} does not run on {inputs.what}: {in_short(error)}; pass inputs=") from error
    if expected is None:
        return None
    try:
        got = inputs.run(adapted.model)
        with adapted.without():
            before = inputs.run(adapted.model)
    except Exception as error:  # a model may raise any exception
        raise ExportError(
            f"{type(trained).__name__} with the adapter does not run through PEFT on {inputs.what}: {in_short(error)}. The "
            "model treats one of the layers as PEFT's wrapper cannot be treated; leave that layer out by a rule: 'none'"
        ) from error
    if got is None or before is None or got.shape != expected.shape:
        raise ExportError("PEFT's model does not give outputs of the run's shape")
    found, change = (float((value - expected).abs().max()) for value in (got, before))
    return OutputComparison(inputs.what, found, float(expected.abs().max()), change)


def check_structure(folder: Path, model: nn.Module, low_rank: Sequence[str]) -> dict[str, Slot]:
    """Let PEFT build the adapter from its config, and compare the tensors that it expects with those in the file.

    Args:
        folder: The adapter's folder.
        model: The plain model on the meta device; PEFT changes it.
        low_rank: The parameters with factors.

    Returns:
        Where the factors of each are.

    Raises:
        ExportError: They differ.
    """
    found = slots(model, low_rank)
    peft: Any = optional("peft", "checking an adapter", "hf")
    config = peft.PeftConfig.from_pretrained(str(folder))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that the adapter names another model than this one was loaded by
        adapted = peft.get_peft_model(model, config)
    expected = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(adapted).items()}
    written = {key: entry.shape for key, entry in TensorFile(folder / WEIGHTS).entries.items()}
    if expected != written:
        odd = sorted(key for key in {*expected, *written} if expected.get(key) != written.get(key))[0]
        raise ExportError(
            f"PEFT expects '{odd}' of shape {expected.get(odd)}, and {written.get(odd)} was written; please report this model"
        )
    return found


def _tensor(output: Any) -> Tensor | None:
    """What to compare of a model's output: its logits, or its first floating-point tensor at any depth."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    found = (value if isinstance(value, Tensor) else _tensor(value) for value in values)
    return next((value for value in found if value is not None and value.is_floating_point()), None)
