"""A conversion from two model folders, made by any program, to an adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingrad.console import Tick
from lingrad.convert.compatibility import refuse_other_model
from lingrad.convert.composed import open_folder
from lingrad.convert.lowrank import Goal, detect
from lingrad.convert.output import Output
from lingrad.convert.tensors import Models, TensorPair, pairs, require_parameter, tied_names
from lingrad.convert.work import ChangeRecord
from lingrad.convert.writing import make_adapter
from lingrad.deprecated import renamed_keywords
from lingrad.errors import optional, require
from lingrad.files.model_folder import ModelFolder
from lingrad.maps.factors import Factors
from lingrad.models import open_model
from lingrad.peft.loaders import Target
from lingrad.peft.report import AdapterReport
from lingrad.transforms.linalg import derive_seed


@renamed_keywords("lingrad.convert.convert", base="start", decayed_base="decayed_start")
def convert(
    start: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: str | None = None,
    uniform_rank: bool = False,
    full_svd: bool = False,
    logits: bool = False,
    decayed_start: str | Path | None = None,
    target: Target = "peft",
    allow_residual: float | None = None,
    base_model: str | None = None,
    tick: Tick | None = None,
) -> AdapterReport:
    """Turn the difference of two models into an adapter that PEFT loads, whatever program trained.

    Both folders are read row by row; memory holds a few times the factors of one weight. If the process is killed and the call
    repeated, finished weights are not computed again, and the folder comes out the same to the byte.

    Args:
        start: The folder of the model that the training started from, as ``save_pretrained`` writes it.
        tuned: The folder of the trained model.
        out: The adapter's folder; must not exist.
        rank: At most this many columns for each weight.
        energy: Keep this share of |TUNED - START|_F^2 of each weight.
        max_error: Leave at most this share of |TUNED - START|_F of each weight. With none of the three all of a change is kept,
            down to the rounding floor that `lingrad.convert.lowrank` defines, and decoupled decay is recognised.
        dtype: Of the factors: ``fp32`` (``fp64`` for a float64 model) by default, ``bf16`` or ``fp16``.
        uniform_rank: Give all weights the largest rank that one needs, by columns of zeros.
        full_svd: Decompose each change in full, formed in float64, instead of by random projections.
        logits: Load both models into memory, and compare their logits through PEFT.
        decayed_start: Where to write START with its weights multiplied by the decay that was recognised; the adapter is then
            for that model.
        target: What is to load the adapter, as for `lingrad.peft.export`.
        allow_residual: The largest relative residual |TUNED - (START + B A)| / |TUNED - START| of any weight to accept. By
            default 0.02, or what ``energy`` or ``max_error`` says.
        base_model: What others know the model by that the adapter is for, such as ``owner/name``; by default its folder.
        tick: Called after each tensor: how many are done, of how many, its name.

    Returns:
        The report, which is also in the folder, as ``lingrad_report.json``.

    Raises:
        DataError: A folder cannot be used or written, the two are not of one model, or ``out`` exists.
        SpecError: An option is wrong.
        ExportError: PEFT has no form for the change, or the goal cannot be reached in the dtype; nothing was written.
    """
    goal = Goal(rank, energy, max_error)
    require(
        decayed_start is None or goal.exact,
        "decayed_start",
        "decayed_start needs all of a change, from which decay is separated; leave out rank, energy and max_error",
    )
    decayed = None if decayed_start is None else Path(decayed_start)
    output = Output(Path(out), goal, dtype, uniform_rank, logits, decayed, target, allow_residual, base_model, tick)
    for folder in (start, tuned):
        ModelFolder(Path(folder))  # what is no model's folder is said first
    optional("peft", "checking an adapter", "hf")  # before the search, not after it
    model = open_model(str(Path(start).absolute()))  # a name alone may be that of a built-in model
    was, now = open_folder(Path(start), model), open_folder(Path(tuned), model)
    ignored = refuse_other_model(was, now, tied_names(model, was) | tied_names(model, now))

    def identity() -> dict[str, Any]:
        return {
            "goal": asdict(goal),
            "dtype": dtype,
            "full_svd": full_svd,
            "start": str(start),
            "start files": was.fingerprint(),
            "tuned files": now.fingerprint(),
            "torch": torch.__version__,
        }

    def find(pair: TensorPair) -> tuple[ChangeRecord, Factors | None]:
        return _find(pair, start=was, tuned=now, model=model, output=output, full_svd=full_svd)

    return make_adapter("models", Models(was, now, model, pairs(model, was, now), ignored), output, find, identity)


def _find(
    pair: TensorPair, *, start: ModelFolder, tuned: ModelFolder, model: nn.Module, output: Output, full_svd: bool
) -> tuple[ChangeRecord, Factors | None]:
    """The change of one tensor."""
    shape = start.entry(pair.name).shape
    if pair.equal(start, tuned):
        return ChangeRecord(pair.name, "equal", shape), None
    require_parameter(model, pair)
    change = pair.difference(start, tuned)
    if pair.shape is None:
        return ChangeRecord(pair.name, "full", shape, norm=change.sums().energy ** 0.5), None
    found = detect(change, output.goal, derive_seed(0, pair.name), full_svd=full_svd)
    if found is None:
        return ChangeRecord(pair.name, "equal", shape), None
    record = ChangeRecord(
        pair.name, "low_rank", shape, found.factors.rank, found.decay, found.norm, found.residual, found.floor
    )
    return record, pair.reorient(found.factors).to(dtype=output.factor_dtype(change.dtype))
