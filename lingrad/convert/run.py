"""A checkpoint of a run with ``ledger=True`` as an adapter: the factors that it merged, stacked and compressed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingrad.config.sharing import group_targets
from lingrad.config.spec import format as format_spec
from lingrad.config.targets import resolve_model
from lingrad.console import Tick
from lingrad.convert.compatibility import refuse_other_model
from lingrad.convert.composed import open_folder
from lingrad.convert.lowrank import MOST_ROUNDINGS, Goal
from lingrad.convert.output import Output
from lingrad.convert.tensors import Models, TensorPair, pairs, require_parameter, tied_names
from lingrad.convert.work import ChangeRecord
from lingrad.convert.writing import make_adapter
from lingrad.deprecated import renamed_keywords
from lingrad.engine.saved import FORMAT, Saved
from lingrad.errors import CheckpointError, LingradError, optional, require, shown
from lingrad.files.model_folder import ModelFolder
from lingrad.files.optimizer_file import FILE, identify, load_state
from lingrad.files.reading import all_finite
from lingrad.maps.factors import Factors, compress
from lingrad.models import open_model
from lingrad.peft.loaders import Target
from lingrad.peft.report import AdapterReport


@renamed_keywords("lingrad.convert.convert_run", base="start", decayed_base="decayed_start")
def convert_run(
    run: str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    uniform_rank: bool = False,
    logits: bool = False,
    decayed_start: str | Path | None = None,
    target: Target = "peft",
    allow_residual: float | None = None,
    base_model: str | None = None,
    tick: Tick | None = None,
) -> AdapterReport:
    """Turn a checkpoint of a lingrad run with ``ledger=True`` into an adapter that PEFT loads, exact to rounding.

    Nothing is searched for: the bases and coordinates of every merge are in the checkpoint. Weights that trained in full are
    saved in full.

    Args:
        run: The checkpoint's folder: the model as ``save_pretrained`` writes it, and ``optimizer.pt``, written by
            ``torch.save(opt.state_dict())``. In adapter mode not of a run with ``self_contained=False``.
        out: The adapter's folder; must not exist.
        start: The folder of the model that the run started from, to measure what the adapter leaves of the change.
        rank: At most this many columns for each weight.
        dtype: Of the factors: ``fp32`` (``fp64`` for a float64 model) by default, ``bf16`` or ``fp16``.
        uniform_rank: Give all weights the largest rank that one needs, by columns of zeros.
        logits: Load both models into memory, and compare their logits through PEFT; needs ``start``.
        decayed_start: Where to write ``start`` with its weights multiplied by the run's decay; the adapter is then for it.
        target: What is to load the adapter, as for `lingrad.peft.export`.
        allow_residual: The largest relative residual of any weight to accept, by default 0.02: of TUNED - START where ``start``
            is given, else of the recorded change.
        base_model: What others know the model by that the adapter is for, such as ``owner/name``; by default its folder.
        tick: Called after each tensor: how many are done, of how many, its name.

    Returns:
        The report, which is also in the folder, as ``lingrad_report.json``.

    Raises:
        CheckpointError: The checkpoint is not of such a run.
        DataError: A folder cannot be used, or ``out`` exists or cannot be written.
        SpecError: An option is wrong.
        ExportError: PEFT has no form for the change; nothing was written.
    """
    for option, asked in (("logits", logits), ("decayed_start", decayed_start is not None)):
        needed = f"{option} needs the model that the run started from; give its folder as start"
        require(not asked or start is not None, option, needed)
    decayed = None if decayed_start is None else Path(decayed_start)
    output = Output(Path(out), Goal(rank), dtype, uniform_rank, logits, decayed, target, allow_residual, base_model, tick)
    for folder in (run, start):
        if folder is not None:
            ModelFolder(Path(folder))  # what is no model's folder is said first
    optional("peft", "checking an adapter", "hf")
    model = open_model(str(Path(run).absolute()))  # a name alone may be that of a built-in model
    tuned = open_folder(Path(run), model)
    was = None if start is None else open_folder(Path(start), model)
    saved = _Run(Saved(load_state(Path(run))), model, tuned)
    tied = set() if was is None else tied_names(model, was) | tied_names(model, tuned)
    ignored = () if was is None else refuse_other_model(was, tuned, tied)
    models = Models(was, tuned, model, pairs(model, was or tuned, tuned, list(saved.targets)), ignored)
    saved.require_all(models.pairs)

    def identity() -> dict[str, Any]:
        return {
            "run": {**tuned.fingerprint(), FILE: identify(Path(run))},
            "start": None if was is None else [str(start), was.fingerprint()],
            "options": {"rank": rank, "dtype": dtype},
            "torch": torch.__version__,
        }

    def find(pair: TensorPair) -> tuple[ChangeRecord, Factors | None]:
        return saved.find(pair, was, output)

    return make_adapter("checkpoint", models, output, find, identity, saved.transforms)


class _Run:
    """A checkpoint's optimizer state, read as ledgers.

    Args:
        saved: The state.
        model: The model, on the meta device.
        tuned: The folder with its weights.

    Attributes:
        targets: Parameter -> how it was transformed.
        full: Names of the parameters that trained in full.

    Raises:
        CheckpointError: It is not that of a lingrad run with a ledger, or is of another model.
    """

    def __init__(self, saved: Saved, model: nn.Module, tuned: ModelFolder) -> None:
        name = f"the {FILE} of '{tuned.path}'"
        if not saved.is_run:
            raise CheckpointError(
                f"{name} was not written by lingrad's optimizer; compare the weights with those they started from: "
                "lingrad convert START TUNED"
            )
        for found in saved.formats:
            if found != FORMAT:
                raise CheckpointError(f"{name} has format {shown(found)}; expected {FORMAT!r}, of this version")
        try:
            specs, self.full = saved.names(coords=True), {*saved.names(coords=False)}
        except CheckpointError as error:
            raise CheckpointError(f"{name} is damaged: {error}") from error
        for param in specs:
            if not saved.has_ledger(param):
                raise CheckpointError(
                    f"{name} has no ledger for '{param}': the run was made without ledger=True; compare its weights with those "
                    "they started from: lingrad convert START TUNED"
                )
            if saved.of_run("mode") == "adapter" and not saved.has_coords(param):
                raise CheckpointError(
                    f"'{param}' has coordinates that are not in {FILE}; save the run in optimizer mode, after "
                    "opt.switch('optimizer'), or make it without self_contained=False"
                )
        try:
            plan = resolve_model(model, specs)
        except LingradError as error:
            raise CheckpointError(f"{name} is of another model: {error}") from error
        self._saved, self._folder, self._model = saved, tuned, model
        self.targets = {found.target.name: found for found in group_targets(plan.targets, saved.of_run("share"))}

    @property
    def transforms(self) -> tuple[str, ...]:
        """Config strings of the run's bases."""
        return tuple(dict.fromkeys(format_spec(found.target.transform) for found in self.targets.values()))

    def require_all(self, found: Sequence[TensorPair]) -> None:
        """Make sure that every weight the run changed is in the model's files, so that no change is left out.

        Args:
            found: The tensors in the files.

        Raises:
            CheckpointError: One is not.
        """
        lost = sorted({*self.targets} - {pair.param for pair in found})
        if lost:
            raise CheckpointError(
                f"the run changed '{lost[0]}'{f' and {len(lost) - 1} more' if lost[1:] else ''}, and the files of "
                f"'{self._folder.path}' do not have it under this name; save the run's model under the names of its "
                "parameters: safetensors.torch.save_model(model, 'model.safetensors')"
            )

    def find(self, pair: TensorPair, start: ModelFolder | None, output: Output) -> tuple[ChangeRecord, Factors | None]:
        """The change of one tensor.

        Args:
            pair: The tensor.
            start: The folder of the model that the run started from, where it is known.
            output: The goal, and the dtype of the factors.

        Returns:
            Its record, and the factors of the layout's matrix, [out, in].

        Raises:
            CheckpointError: It has another shape than in the run.
        """
        shape = self._folder.entry(pair.name).shape
        if pair.param not in self.targets:
            same = pair.param not in self.full if start is None else pair.equal(start, self._folder)
            if not same:
                require_parameter(self._model, pair)
            return ChangeRecord(pair.name, "equal" if same else "full", shape), None
        own = self._folder.entry(pair.name).dtype
        factors, decay = self._change(pair.param, own)
        if factors is None and decay == 1.0:
            return ChangeRecord(pair.name, "equal", shape), None
        if factors is None:  # it has only decayed
            m, n = self.targets[pair.param].target.layout.shape
            factors = Factors(torch.zeros(m, 1), torch.zeros(1, n))
        if factors.shape != self.targets[pair.param].target.layout.shape:
            raise CheckpointError(f"'{pair.name}' is {shape} in the model, and {factors.shape} in its ledger")
        factors = factors.to(dtype=torch.float64)
        if not all(map(all_finite, (factors.left, factors.right))):
            raise CheckpointError(
                f"the recorded change of '{pair.name}' is not finite: the run has diverged; give an earlier one"
            )
        norm, floor = _norm(factors), None
        factors, left = compress(factors, rank=output.goal.rank)
        if start is not None:
            norm, left, floor = self._measured(pair, start, factors, decay, left * norm)
        record = ChangeRecord(pair.name, "low_rank", shape, factors.rank, decay, norm, left, floor)
        return record, factors.to(dtype=output.factor_dtype(own))

    def _measured(
        self, pair: TensorPair, start: ModelFolder, factors: Factors, decay: float, dropped: float
    ) -> tuple[float, float, float]:
        """|TUNED - START|_F, and as shares of it what the factors leave and what rounding once leaves."""
        change, stored = pair.difference(start, self._folder), pair.reorient(factors)
        sums = change.sums()
        change.decay = decay
        left = change.residual(stored.left, stored.right).energy ** 0.5
        if not left <= dropped + MOST_ROUNDINGS * sums.rounding**0.5:  # nor NaN
            raise CheckpointError(
                f"'{pair.name}' of '{self._folder.path}' is not that of '{start.path}' plus the run's change, which leaves "
                f"{left / sums.energy**0.5:.1e} of the difference: it is not the model that the run started from"
            )
        norm = sums.energy**0.5 or 1.0
        return norm, left / norm, sums.rounding**0.5 / norm

    def _change(self, name: str, dtype: torch.dtype) -> tuple[Factors | None, float]:
        """The factors of a weight's change, and the factor by which decay has multiplied its starting value."""
        return self._saved.change(self.targets[name], dtype)


def _norm(factors: Factors) -> float:
    """|left @ right|_F without forming it."""
    left, right = factors.left.double(), factors.right.double()
    return float(((left.t() @ left) * (right @ right.t())).sum().clamp(min=0).sqrt())
