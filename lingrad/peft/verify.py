"""Adapters as PEFT loads them: their structure and weights, to be compared with what was trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import ExportError, in_short, optional
from lingrad.files.tensorfile import TensorFile
from lingrad.peft.bare import devices_of
from lingrad.peft.report import ChangedTensor, ratio
from lingrad.peft.slots import PREFIX, Slot, slots
from lingrad.peft.write import WEIGHTS, AdapterPlan, Written


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

    @contextmanager
    def without_originals(self) -> Iterator[None]:
        """A context in which the modules that PEFT has copies of hold NaN: whatever reads one in its copy's place shows it.

        They hold the trained weights here, since nobody knows what they started from, and in use would hold others.
        """
        taken: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name in self.planned.saved_modules:
                for param in self._bare().get_submodule(name).original_module.parameters():
                    if param.is_floating_point():
                        taken.append((param, param.data))
                        param.data = param.new_full((), torch.nan).expand(param.shape)
            yield
        finally:
            for param, value in reversed(taken):
                param.data = value

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
