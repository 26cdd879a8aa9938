"""Is it what was trained? PEFT loads the adapter into a base model, and weights and outputs are compared with the run's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import ExportError, optional
from lingrad.peft.bare import devices_of
from lingrad.peft.report import Row, ratio
from lingrad.peft.slots import PREFIX, Slot
from lingrad.peft.write import Plan, Written

SEED = 0
ROWS, LENGTH = 2, 16  # of generated token ids


@dataclass(frozen=True)
class Inputs:
    """What models are run on.

    Args:
        args: Positional arguments.
        kwargs: Arguments by name.
        what: In words.
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
    """Inputs as they were given, or token ids drawn at random for a language model.

    Args:
        inputs: A tensor, a tuple of positional arguments, a mapping of named ones, or None.
        model: The model.

    Returns:
        The inputs; None where none were given and none can be made up.
    """
    if isinstance(inputs, Mapping):
        return Inputs((), dict(inputs), "the inputs given")
    if isinstance(inputs, tuple):
        return Inputs(inputs, {}, "the inputs given")
    if inputs is not None:
        return Inputs((inputs,), {}, "the inputs given")
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or getattr(model, "main_input_name", None) != "input_ids":
        return None
    longest = getattr(config, "max_position_embeddings", None)
    length = min(LENGTH, longest) if isinstance(longest, int) and longest > 0 else LENGTH
    ids = torch.randint(0, vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(SEED), device="cpu")
    ids = ids.to(next(model.parameters()).device)
    kwargs = {"input_ids": ids} | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})
    return Inputs((), kwargs, f"{ROWS} x {length} random token ids")


class Loaded:
    """An adapter that PEFT has loaded into a base model, and whose every part was found in its place.

    Args:
        base: The plain base model; PEFT changes its structure, not its weights.
        folder: The adapter's folder.
        planned: What should be there.

    Raises:
        ExportError: PEFT did not load it, or not to the places meant.
    """

    def __init__(self, base: nn.Module, folder: Path, planned: Plan) -> None:
        peft = optional("peft", "checking an adapter by PEFT", "hf")
        self.planned = planned
        with warnings.catch_warnings(), torch.random.fork_rng(devices=devices_of(base)):
            warnings.simplefilter("ignore")  # what they would tell is checked below
            try:
                self.model: Any = peft.PeftModel.from_pretrained(base, str(folder)).eval()
            except Exception as error:  # PEFT raises whatever the first thing that goes wrong raises
                raise ExportError(f"PEFT does not load the adapter: {error}") from error
        self._check_places()

    def delta(self, slot: Slot) -> Tensor:
        """B A as PEFT has it, in the weight's shape."""
        found: Tensor = self._layer(slot).get_delta_weight("default")
        return found.detach()

    def tensor(self, name: str) -> Tensor:
        """A tensor that was saved as it is."""
        for module in self.planned.whole:
            if name.startswith(f"{module}."):
                wrapper = self._plain().get_submodule(module)
                found: Tensor = wrapper.modules_to_save["default"].state_dict()[name.removeprefix(f"{module}.")]
                return found
        beside: Tensor = self._plain().get_parameter(self.planned.key(name).removeprefix(PREFIX))
        return beside.detach()

    def without(self) -> Any:
        """A context in which the model is the base."""
        return self.model.disable_adapter()

    def _plain(self) -> Any:
        return self.model.base_model.model

    def _layer(self, slot: Slot) -> Any:
        return self._plain().get_submodule(slot.module + ".base_layer" * slot.wrappers)

    def _check_places(self) -> None:
        layers, saved = set(), set()
        for name, module in self._plain().named_modules():
            if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
                saved.add(name)
            if hasattr(module, "get_delta_weight"):
                layers.add(name)
        expected = {slot.module + ".base_layer" * slot.wrappers for slot in self.planned.slots.values()}
        for kind, found, meant in (("an adapter", layers, expected), ("a copy", saved, set(self.planned.whole))):
            if found != meant:
                lost, more = sorted(meant - found), sorted(found - meant)
                where = f"none at {lost[0]}" if lost else f"one at {more[0]}, which has none"
                raise ExportError(f"PEFT puts {kind} of a weight elsewhere than meant: {where}")


def compare_weights(
    loaded: Loaded,
    written: Written,
    now: Callable[[str], Tensor],
    base: Callable[[str], Tensor],
    kept: Mapping[str, float],
) -> list[Row]:
    """Measure what PEFT's weights lack of the run's.

    Args:
        loaded: The adapter, loaded by PEFT.
        written: What was written.
        now: The run's weight by name, not rounded.
        base: The weight without the adapter by name.
        kept: What decay has left, by name.

    Returns:
        A row for each.
    """
    rows = []
    for name, slot in loaded.planned.slots.items():
        delta = loaded.delta(slot).double()
        start, made = base(name).to(delta.device).double(), now(name).to(delta.device).double()
        made = made - start
        size = float(made.norm())
        residual = ratio(float((made - delta).norm()), size)
        rows.append(
            Row(name, written.ranks[name], ratio(size, float(start.norm())), residual, kept[name], written.factor_bytes[name])
        )
    return rows


def _tensor(output: Any) -> Tensor | None:
    """What to compare of a model's output: its logits, or its first tensor of numbers."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
