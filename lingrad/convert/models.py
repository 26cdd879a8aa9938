"""A conversion from two model folders, made by any program, to an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingrad.console import Tick
from lingrad.convert.lowrank import Goal, detect
from lingrad.convert.report import Report
from lingrad.convert.tensors import Pair, pairs, require_place, tied_names
from lingrad.convert.work import Parts, Record
from lingrad.convert.writing import Job
from lingrad.errors import DataError, optional, require
from lingrad.files.atomic import publish, refuse_existing
from lingrad.files.model_folder import ModelFolder, refuse_other_model
from lingrad.maps.factors import Factors
from lingrad.models import open_model
from lingrad.transforms.linalg import derive_seed

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def convert(
    base: str | Path,
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
    decayed_base: str | Path | None = None,
    tick: Tick | None = None,
) -> Report:
    """Turn what a training made of a model into an adapter that PEFT loads, whatever program trained.

    Both folders are read row by row; memory holds a few times the factors of one weight. What is finished when the process is
    killed is not computed again by the next call, and the folder comes out the same to the byte.

    Args:
        base: The folder of the model that the training started from, as ``save_pretrained`` writes it.
        tuned: The folder of what became of it.
        out: The adapter's folder; must not exist.
        rank: At most so many columns for each weight.
        energy: Keep this share of |TUNED - BASE|_F^2 of each weight.
        max_error: Leave at most this share of |TUNED - BASE|_F of each weight. With none of the three all of a change is
            kept, down to the rounding floor that `lingrad.convert.lowrank` defines, decoupled decay being recognised.
        dtype: Of the factors: ``fp32`` (``fp64`` for a float64 model) by default, ``bf16`` or ``fp16``.
        uniform_rank: Give all weights the largest rank that one needs, by columns of zeros.
        full_svd: Decompose each change in full, formed in float64, instead of by random projections.
        logits: Load both models whole, and compare their logits through PEFT.
        decayed_base: Where to write the base with its weights multiplied by what decoupled decay kept of them, for which the
            adapter then is.
        tick: Called after each tensor: how many are done, of how many, its name.

    Returns:
        What was found; also in ``lingrad_report.json`` in the folder.

    Raises:
        DataError: A folder cannot be used, the two are not of one model, ``out`` exists, or it cannot be written.
        SpecError: An option is wrong.
        ExportError: PEFT has no form for the change, or the goal cannot be reached in the dtype; nothing was written.
    """
    goal = Goal(rank, energy, max_error)
    require(dtype is None or dtype in DTYPES, "dtype", f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    require(
        decayed_base is None or goal.exact,
        "decayed_base",
        "decayed_base is for a change kept whole, where decay is taken apart from it; leave out rank, energy and max_error",
    )
    out = Path(out)
    refuse_places(out, decayed_base)
    was, now = ModelFolder(Path(base)), ModelFolder(Path(tuned))
    optional("peft", "checking an adapter", "hf")  # before the search, not after it
    model = open_model(str(Path(base).absolute()))  # a name alone may be that of a model known by name
    tied = tied_names(model, was) | tied_names(model, now)
    refuse_other_model(was, now, tied)
    options: dict[str, Any] = {"goal": asdict(goal), "dtype": dtype, "full_svd": full_svd}
    folders = {"base": str(base), "base files": was.fingerprint(), "tuned files": now.fingerprint()}
    with finishing(out, {**options, **folders, "torch": torch.__version__}) as work:
        job = Job(was, now, model, pairs(model, was, now), work)
        wanted = None if dtype is None else DTYPES[dtype]
        job.find(partial(_find, model=model, base=was, tuned=now, goal=goal, dtype=wanted, full_svd=full_svd), tick)
        with job.base_for(None if decayed_base is None else Path(decayed_base), tick) as for_base:
            report = job.write(goal, for_base, uniform_rank, logits)
            publish(work.finished, out)
    return report


def refuse_places(out: Path, decayed_base: str | Path | None) -> None:
    """Make sure that what shall be written can be, without one in the other.

    Args:
        out: The adapter's folder.
        decayed_base: That of the decayed base.

    Raises:
        DataError: One exists.
        SpecError: One lies in the other.
    """
    refuse_existing(out)
    if decayed_base is None:
        return
    refuse_existing(Path(decayed_base))
    a, b = out.resolve(), Path(decayed_base).resolve()
    apart = a != b and a not in b.parents and b not in a.parents
    require(apart, "decayed_base", f"'{out}' and '{decayed_base}' lie one in the other; name folders apart")


@contextmanager
def finishing(out: Path, identity: dict[str, Any]) -> Iterator[Parts]:
    """The hidden folder of a conversion, removed once the block has published its result.

    Args:
        out: The folder to be.
        identity: What is converted, and how.

    Yields:
        The hidden folder.

    Raises:
        DataError: It was left by another conversion, or cannot be written.
    """
    try:
        work = Parts(out, identity)
    except OSError as error:
        raise DataError(f"cannot write '{out}': {error}") from error
    try:
        try:
            yield work
            shutil.rmtree(work.folder)
        finally:
            work.close()
    except OSError as error:
        raise DataError(
            f"cannot write '{out}': {error}; what was finished is kept, and the same command goes on from it"
        ) from error


def _find(
    pair: Pair,
    *,
    model: nn.Module,
    base: ModelFolder,
    tuned: ModelFolder,
    goal: Goal,
    dtype: torch.dtype | None,
    full_svd: bool,
) -> tuple[Record, Factors | None]:
    """The change of one tensor."""
    shape = base.entry(pair.name).shape
    if pair.equal(base, tuned):
        return Record(pair.name, "equal", shape), None
    require_place(model, pair)
    change = pair.difference(base, tuned)
    if pair.shape is None:
        m, n = change.shape
        norm = change.rest(torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64)).energy ** 0.5
        return Record(pair.name, "full", shape, norm=norm), None
    found = detect(change, goal, derive_seed(0, pair.name), full_svd=full_svd)
    if found is None:  # numbers that are equal in float64 and not in their own dtype there are none of
        return Record(pair.name, "equal", shape), None
    own = torch.float64 if change.dtype == torch.float64 else torch.float32
    record = Record(*(pair.name, "low_rank", shape, found.factors.rank, found.kept, found.norm, found.rest, found.floor))
    return record, pair.turned(found.factors).to(dtype=dtype or own)
