"""An adapter that was written, compared with what was exported: PEFT loads it onto the starting model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lingrad.errors import ExportError
from lingrad.peft.fit import rounded_up
from lingrad.peft.outputs import compare_outputs, make_inputs
from lingrad.peft.report import ChangedTensor, OutputComparison
from lingrad.peft.source import ExportSource, dense
from lingrad.peft.verify import LoadedAdapter, compare_weights
from lingrad.peft.write import Written, value_of

EXACT = 1e-3  # a relative residual that needs no permission
ROUNDINGS = 100  # of a weight, each of half an epsilon, that may add up to more than that where little has changed
OUTPUTS = 100  # epsilons by which outputs of two ways to compute the same differ, as a share of the largest


class Comparison:
    """An adapter that PEFT has loaded onto the starting model, and what was exported.

    Args:
        source: What was exported.
        given: The starting model, where it was given.
        written: What was written.
        full: The tensors saved in full.
        folder: Where it was written.

    Attributes:
        rebuilt: Names of weights of the starting model that were computed, as the trained ones minus their change.
    """

    def __init__(
        self, source: ExportSource, given: nn.Module | None, written: Written, full: Mapping[str, Tensor], folder: Path
    ) -> None:
        self.source, self.given, self.written = source, given, written
        model = source.bare if given is None else given
        self.rebuilt = [name for name in written.ranks if given is None and source.start(name) is None]
        for name in self.rebuilt:
            model.get_parameter(name).data = source.rebuilt(name)
        self._saved = {name: value_of(source.bare, full, name) for name in written.plan.tensors(source.bare)}
        self._dtypes = {name: model.get_parameter(name).dtype for name in written.ranks}
        self._starts = {name: dense(model, name) for name in written.ranks}
        for name in written.alongside:  # PEFT writes into these
            model.get_parameter(name).data = model.get_parameter(name).detach().clone()
        self._loaded = LoadedAdapter(model, folder, written.plan)

    def weights(self, allow: float | None, lost: Mapping[str, str]) -> tuple[list[ChangedTensor], float]:
        """Compare the weights.

        Args:
            allow: The residual to accept, where it was given.
            lost: Parameter -> why the options that were asked for may have lost some of its change.

        Returns:
            A row for each weight with factors, and the residual of all of them together.

        Raises:
            ExportError: A residual is too large, or a tensor that is saved in full differs.
        """
        rows, residual = compare_weights(
            self._loaded, self.written, self.source.now, self._starts.__getitem__, self.source.decay
        )
        for row in rows:
            explained = (
                ROUNDINGS * torch.finfo(self._dtypes[row.name]).eps / row.change
                if row.change and is_wide(self._dtypes[row.name])
                else 0.0
            )
            limit = allow if allow is not None else max(EXACT, explained)
            if not row.residual <= limit:
                raise ExportError(
                    f"the adapter does not reproduce '{row.name}': the residual is {row.residual:.1e} of its change, over "
                    f"{limit:.1e}, because {self._why(row, lost)}. allow_residual={rounded_up(row.residual)} accepts it"
                )
        for name, value in self._saved.items():
            if not torch.equal(self._loaded.tensor(name).to(value), value):
                raise ExportError(f"'{name}', which is saved in full, came back from PEFT with another value")
        return rows, residual

    def outputs(self, inputs: Any, residual: float) -> OutputComparison | None:
        """Compare the outputs.

        Args:
            inputs: As for `export`.
            residual: The largest residual of any weight.

        Returns:
            What was found; None where there are no inputs, and it is no model of transformers.

        Raises:
            ExportError: They differ by more than the weights and rounding explain, or cannot be compared.
        """
        asked, model = make_inputs(inputs, self.source.model), self.source.model
        reads = getattr(model, "main_input_name", None)
        if asked is None and reads is not None:
            raise ExportError(
                f"the outputs of {type(model).__name__} cannot be compared: no inputs are known for it. Pass some that it runs "
                f"on, such as inputs={{'{reads}': ...}}"
            )
        if asked is None:
            return None
        every = compare_outputs(asked, model, self._loaded)
        if not every:
            raise ExportError(f"the outputs of {type(model).__name__} on {asked.what} hold no numbers that could be compared")
        eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
        eps = max(eps, torch.finfo(torch.float32).eps)  # norms are computed in float32 whatever the dtype

        def share(name: str) -> float:
            """How much of what weights and rounding explain an output differs by; above 1 they do not explain it."""
            limit = OUTPUTS * eps * every[name].largest + max(10 * residual, EXACT) * (every[name].change or 0.0)
            difference = every[name].difference
            return 0.0 if difference == 0.0 else difference / limit if limit else math.inf

        worst = max(every, key=lambda name: (not share(name) <= 1.0, share(name)))
        found = every[worst]
        if not share(worst) <= 1.0:
            self._refuse(f"'{worst or 'the output'}'", found, share(worst))
        return found

    def _refuse(self, name: str, found: OutputComparison, share: float) -> NoReturn:
        """Say how an output differs, and by what that may be."""
        saved, where = self._loaded.planned.saved_modules, f"on {found.inputs}"
        if math.isnan(found.largest):
            raise ExportError(f"the run's own outputs {where} hold NaN in {name}; pass inputs= on which they are numbers")
        if math.isnan(found.difference) and saved:  # that of the originals, which are not in use
            more = f" and {len(saved) - 1} more" if saved[1:] else ""
            raise ExportError(
                f"PEFT's model does not give the run's outputs: {where} it gives NaN in {name}. PEFT trains copies of modules "
                f"('{saved[0]}'{more}), and the model seems to read an original. Freeze that module, or save the model"
            )
        raise ExportError(
            f"PEFT's model does not give the run's outputs: {where} they differ by {found.difference:.1e} in {name}, "
            f"{share:,.1f} times what rounding and the weights explain; some layer does not act through PEFT's wrapper. Leave "
            "it out by a rule: 'none'"
        )

    def _why(self, row: ChangedTensor, lost: Mapping[str, str]) -> str:
        """The cause of a residual that is too large."""
        dtype = self._dtypes[row.name]
        if row.decay != 1.0:
            return (
                f"weight decay has multiplied the starting weight by {row.decay:.6g}, and that part of the change, "
                f"{abs(1 - row.decay):.1e} of the weight, is not of low rank. Use weight_decay=0 for a run that is to become "
                "an adapter, or save the model"
            )
        if row.name in lost:
            return lost[row.name]
        if not is_wide(dtype) and self.source.start(row.name) is None:
            return (
                f"merges into weights in {str(dtype).removeprefix('torch.')} were rounded. Train in adapter mode, or in float32"
            )
        if self.given is None:
            return "another program changed the weight, or PEFT reads the adapter in another way than lingrad"
        why = "the start given is not what the run started from, or other programs changed the weight"
        if dtype.is_floating_point:
            return why
        return (
            f"{why} (on some CPUs bitsandbytes repacks 4-bit layers for good, scales rounded, when a model in eval mode runs "
            "before lingrad.adapt: generate and evaluate with another copy of it)"
        )


def is_wide(dtype: torch.dtype) -> bool:
    """Whether the rounding of merges does not matter: float32 and wider, no half precision and no quantised codes."""
    return dtype.is_floating_point and torch.finfo(dtype).bits >= 32
