"""A conversion from two model folders to an adapter, and back to a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lingrad._files import publish, refuse_existing, write_whole
from lingrad.convert import verify
from lingrad.convert.folders import ModelFolder, refuse_other_model
from lingrad.convert.lowrank import Goal, detect
from lingrad.convert.merging import write_model
from lingrad.convert.pairs import Pair, pairs, require_places, tied_names
from lingrad.convert.parts import Parts, Record
from lingrad.convert.report import FILE, Report, Row
from lingrad.errors import DataError, ExportError, require
from lingrad.factors import Factors
from lingrad.models import open_model
from lingrad.peft.format import write_adapter
from lingrad.transforms.factorize import derive_seed

Tick = Callable[[int, int, str], None]  # tensors done, of how many, the last one's name

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
T = TypeVar("T")


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
    for path in (out, *([] if decayed_base is None else [Path(decayed_base)])):
        refuse_existing(path)
    was, now = ModelFolder(Path(base)), ModelFolder(Path(tuned))
    model = open_model(str(base))
    tied = tied_names(model, was) | tied_names(model, now)
    refuse_other_model(was, now, tied)
    options: dict[str, Any] = {"goal": asdict(goal), "dtype": dtype, "full_svd": full_svd}
    folders = {"base": str(base), "base files": was.fingerprint(), "tuned files": now.fingerprint()}
    try:
        work = Parts(out, {**options, **folders, "torch": torch.__version__})
        job = _Job(was, now, model, pairs(model, was, now), work)
        job.find(goal, None if dtype is None else DTYPES[dtype], full_svd, tick)
        with job.base_for(None if decayed_base is None else Path(decayed_base), tick) as for_base:
            report = job.write(goal, for_base, uniform_rank, logits)
            publish(work.finished, out)
        shutil.rmtree(work.folder)
    except OSError as error:
        raise DataError(
            f"cannot write '{out}': {error}; what was finished is kept, and the same command goes on from it"
        ) from error
    return report


@dataclass
class _Job:
    """One conversion.

    Args:
        base: One folder.
        tuned: The other.
        model: Their model, on the meta device.
        pairs: Its tensors.
        work: Where finished ones are kept.
    """

    base: ModelFolder
    tuned: ModelFolder
    model: nn.Module
    pairs: list[Pair]
    work: Parts

    def find(self, goal: Goal, dtype: torch.dtype | None, full_svd: bool, tick: Tick | None) -> None:
        """Find the change of every tensor that is not done yet."""
        for index, pair in enumerate(self.pairs):
            if self.work.find(index) is None:
                self._find(index, pair, goal, dtype, full_svd)
            if tick is not None:
                tick(index + 1, len(self.pairs), pair.name)

    def _find(self, index: int, pair: Pair, goal: Goal, dtype: torch.dtype | None, full_svd: bool) -> None:
        shape = self.base.entry(pair.name).shape
        if pair.equal(self.base, self.tuned):
            self.work.keep(index, Record(pair.name, "equal", shape))
            return
        require_places(self.model, [pair])
        change = pair.difference(self.base, self.tuned)
        if pair.shape is None:
            norm = change.rest(
                *(torch.zeros(size, dtype=torch.float64) for size in ((change.shape[0], 0), (0, change.shape[1])))
            )
            self.work.keep(index, Record(pair.name, "full", shape, norm=norm.energy**0.5))
            return
        found = detect(change, goal, derive_seed(0, pair.name), full_svd=full_svd)
        if found is None:  # -0.0 became 0.0
            self.work.keep(index, Record(pair.name, "equal", shape))
            return
        own = torch.float64 if change.dtype == torch.float64 else torch.float32
        record = Record(*(pair.name, "low_rank", shape, found.factors.rank, found.kept, found.norm, found.rest, found.floor))
        self.work.keep(index, record, pair.turned(found.factors), dtype or own)

    @contextmanager
    def base_for(self, decayed: Path | None, tick: Tick | None) -> Iterator[Path]:
        """The base that the adapter is for; a decayed one is written first, and removed where what follows fails.

        Args:
            decayed: Where to write it; None for BASE itself.
            tick: Called after each of its tensors.

        Yields:
            Its folder.

        Raises:
            ExportError: No decay was recognised.
        """
        if decayed is None:
            yield self.base.path
            return
        kept = {pair.name: self._record(index).kept for index, pair in enumerate(self.pairs)}
        if all(share == 1.0 for share in kept.values()):
            raise ExportError("no decoupled decay was recognised, and BASE serves as it is; leave --decayed-base out")

        def value(name: str) -> Tensor:
            weight, share = self.base.read(name), kept.get(name, 1.0)
            return weight if share == 1.0 else (weight.double() * share).to(weight.dtype)

        write_model(self.base, decayed, value, tick)
        try:
            yield decayed
        except BaseException:
            shutil.rmtree(decayed, ignore_errors=True)
            raise

    def write(self, goal: Goal, base: Path, uniform_rank: bool, logits: bool) -> Report:
        """Write the adapter, read it again, compare, and write the report beside it."""
        records = {pair: self._record(index) for index, pair in enumerate(self.pairs)}
        changed = {pair: record for pair, record in records.items() if record.kind != "equal"}
        if not changed:
            raise ExportError(f"'{self.tuned.path}' has the same weights as '{self.base.path}'; there is nothing to convert")
        low = {pair: record for pair, record in changed.items() if record.kind == "low_rank"}
        most = max((record.rank for record in low.values()), default=0)
        where = {pair.param: self.pairs.index(pair) for pair in low}

        def factors(param: str) -> Factors:
            found = self.work.factors(where[param])
            return padded(found, most) if uniform_rank else found

        files = {pair.param: pair.name for pair in self.pairs}
        folder = self.work.finished
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        full = [pair.param for pair in changed if pair not in low]
        written = write_adapter(
            folder,
            self.model,
            Lazy(list(where), factors),
            Lazy(full, lambda param: self.tuned.read(files[param]), files),
            base=str(base),
        )
        slots = verify.check_structure(folder, self.model, list(where))
        rows = []
        lost = norm = 0.0
        for pair, record in changed.items():
            row = Row(pair.param, record.kind, record.shape)
            if pair in low:
                left = verify.residuals(folder, slots[pair.param], pair, record, self.base, self.tuned)
                _require_reached(goal, pair, record, left)
                lost, norm = lost + (left.plain * record.norm) ** 2, norm + record.norm**2
                row = replace(
                    row,
                    rank=most if uniform_rank else record.rank,
                    kept=record.kept,
                    residual=left.plain,
                    without_decay=left.without_decay,
                    floor=record.floor,
                    full_rank=record.rank >= min(pair.shape or record.shape),
                )
            rows.append(row)
        report = Report(
            rows=tuple(rows),
            equal=len(records) - len(changed),
            residual=(lost / norm) ** 0.5 if norm else 0.0,
            nbytes=written.nbytes,
            model_bytes=sum(file.path.stat().st_size for file in self.tuned.files.values()),
            goal=_words(goal),
            logits=verify.compare_logits(folder, base, self.tuned.path) if logits else None,
        )
        write_whole(folder / FILE, report.json().encode())
        return report

    def _record(self, index: int) -> Record:
        found = self.work.find(index)
        if found is None:
            raise DataError(f"a part of '{self.work.folder}' was changed while it was used; run the command again")
        return found


class Lazy(Mapping[str, T], Generic[T]):
    """A mapping that reads a value whenever it is asked for.

    Args:
        names: The keys it tells of.
        make: Key -> value.
        known: More keys that it has a value for.
    """

    def __init__(self, names: list[str], make: Callable[[str], T], known: Mapping[str, Any] | None = None) -> None:
        self._names, self._make = names, make
        self._known = {*names, *(known or ())}

    def __getitem__(self, key: str) -> T:
        if key not in self._known:
            raise KeyError(key)
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def padded(factors: Factors, rank: int) -> Factors:
    """The same change with more columns: zeros."""
    more = rank - factors.rank
    left, right = factors.left, factors.right

    def zeros(m: int, n: int) -> Tensor:
        return left.new_zeros(m, n)

    return Factors(torch.cat([left, zeros(left.shape[0], more)], 1), torch.cat([right, zeros(more, right.shape[1])]))


def _require_reached(goal: Goal, pair: Pair, record: Record, left: verify.Residuals) -> None:
    """Make sure that what was written leaves what was found, but for the rounding of its factors."""
    reached = left.without_decay if goal.exact else left.plain
    if goal.lost and reached > goal.lost**0.5 * (1 + 1e-6):
        raise ExportError(
            f"'{pair.name}': factors in {left.dtype} leave {reached:.2e} of the change, at most {goal.lost**0.5:.2e} was asked "
            "for; write them in fp32 (leave --dtype out), or ask for less"
        )
    if reached > record.rest + 2 * torch.finfo(left.dtype).eps:
        raise ExportError(
            f"'{pair.name}': the file that was written leaves {reached:.2e} of the change, and {record.rest:.2e} was found; "
            "a folder was changed meanwhile, or the disk is failing"
        )


def _words(goal: Goal) -> str:
    if goal.exact:
        return "all of the change, down to rounding"
    name = next(name for name in ("rank", "energy", "max_error") if getattr(goal, name) is not None)
    return f"{name.replace('_', ' ')} {getattr(goal, name):g}"
