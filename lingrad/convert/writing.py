"""Finished tensors assembled to an adapter: its files are written, read again and compared, and the report is added."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.convert.lazy import Lazy
from lingrad.convert.limits import require_allowed, require_reached, words
from lingrad.convert.logits import compare_logits
from lingrad.convert.merge import decayed_weight, write_model
from lingrad.convert.notes import notes
from lingrad.convert.output import Output
from lingrad.convert.tensors import Models, TensorPair, smaller_in_full
from lingrad.convert.work import ChangeRecord, WorkFolder, unfinished
from lingrad.errors import DataError, ExportError
from lingrad.files.atomic import publish
from lingrad.files.model_folder import ModelFolder
from lingrad.files.tensorfile import TensorFile
from lingrad.maps.factors import Factors, padded
from lingrad.peft import verify
from lingrad.peft.card import add_tokenizer, unnamed, write_card
from lingrad.peft.fit import check_written, largest_rank, limited, refuse_full, same_rank
from lingrad.peft.report import AdapterReport, ChangedTensor, Writer
from lingrad.peft.slots import Slot
from lingrad.peft.write import WEIGHTS, write_adapter

Identity = Callable[[], Mapping[str, Any]]
Finder = Callable[[TensorPair], tuple[ChangeRecord, Factors | None]]


def make_adapter(
    source: Writer, models: Models, output: Output, find: Finder, identity: Identity, transforms: tuple[str, ...] = ()
) -> AdapterReport:
    """Find the changes that are not found yet, write the adapter, and give it its name.

    Args:
        source: What is converted, for the report.
        models: The models.
        output: What to write.
        find: Gives the record and the factors of one tensor's change.
        identity: Gives what is converted, and how: an unfinished conversion is resumed where this is the same, and the folder
            is published where it still is.
        transforms: Config strings of the bases, where they are known.

    Returns:
        The report.

    Raises:
        DataError: A folder cannot be written, what is converted changed meanwhile, or another conversion left its work or is
            running.
    """
    with unfinished(output.out, was := identity()) as work:
        job = _Job(models, output, work)
        job.find(find)
        with job.start_for() as start:
            report = job.write(source, start, transforms)
            changed = [key for key, value in identity().items() if value != was[key]]
            if changed:
                raise DataError(
                    f"{changed[0]} changed while it was converted, and nothing was written; wait until whatever writes there "
                    f"has finished, remove '{work.folder}', and run the command again"
                )
            publish(work.finished, output.out)
    return replace(report, path=str(output.out))


class Residuals(NamedTuple):
    """What the factors in a file leave of a change.

    Args:
        residual: |TUNED - (START + B A)|_F / |TUNED - START|_F.
        without_decay: |TUNED - (decay * START + B A)|_F / |TUNED - START|_F.
        dtype: The dtype of the factors.
    """

    residual: float
    without_decay: float
    dtype: torch.dtype


def residuals(
    folder: Path, slot: Slot, pair: TensorPair, record: ChangeRecord, start: ModelFolder, tuned: ModelFolder
) -> Residuals:
    """What the factors in a file leave of a change, entry by entry in float64.

    Args:
        folder: The adapter's folder.
        slot: Where the factors are.
        pair: The tensor.
        record: Its change, as it was found.
        start: The one model folder.
        tuned: The other.

    Returns:
        The residuals.
    """
    file = TensorFile(folder / WEIGHTS)
    a, b = (file.read(key) for key in slot.keys)
    factors = pair.reorient(slot.decode(a, b)).to(dtype=torch.float64)
    change = pair.difference(start, tuned)
    found = []
    for decay in dict.fromkeys((1.0, record.decay)):
        change.decay = decay
        found.append(change.residual(factors.left, factors.right).energy ** 0.5 / record.norm)
    return Residuals(found[0], found[-1], a.dtype)


@dataclass
class _Job:
    """One conversion, in its hidden folder."""

    models: Models
    output: Output
    work: WorkFolder

    def find(self, find: Finder) -> None:
        """Find the change of every tensor that is not done yet."""
        pairs, tick = self.models.pairs, self.output.tick
        for index, pair in enumerate(pairs):
            if not self._has(index, pair):
                record, factors = find(pair)
                self.work.store(index, record, factors, self._inputs(pair))
            if tick is not None:
                tick(index + 1, len(pairs), pair.name)

    def _has(self, index: int, pair: TensorPair) -> bool:
        """Whether a tensor was done before, from the values that the folders hold now; that one is equal is looked up again."""
        record = self.work.find(index)
        if record is None or record.name != pair.name or record.kind == "equal":
            return False
        return self.work.find(index, self._inputs(pair)) is not None

    def _inputs(self, pair: TensorPair) -> str:
        """A checksum of a tensor in both folders."""
        folders = (self.models.start, self.models.tuned)
        return " ".join(folder.digest(pair.name) for folder in folders if folder is not None)

    @contextmanager
    def start_for(self) -> Iterator[Path | None]:
        """The folder of the model that the adapter is for: START, or a decayed one, which is removed if the block fails.

        Yields:
            The folder; None where it is not known.

        Raises:
            ExportError: No decay was recognised.
        """
        start, decayed = self.models.start, self.output.decayed_start
        if decayed is None or start is None:
            yield None if start is None else start.path
            return
        factors = {pair.name: self._record(index).decay for index, pair in enumerate(self.models.pairs)}
        if all(factor == 1.0 for factor in factors.values()):
            raise ExportError(
                "no decoupled decay was recognised, so the adapter is for START itself; leave --decayed-start out"
            )

        def value(name: str) -> Tensor:
            return decayed_weight(name, start.read(name), factors.get(name, 1.0))

        write_model(start, decayed, value, self.output.tick)
        try:
            yield decayed
        except BaseException:
            shutil.rmtree(decayed, ignore_errors=True)
            raise

    def write(self, source: Writer, start: Path | None, transforms: tuple[str, ...]) -> AdapterReport:
        """Write the adapter, read it again, compare, and add the report.

        Args:
            source: What is converted.
            start: The folder of the model that the adapter is for.
            transforms: Config strings of the bases.

        Returns:
            The report.

        Raises:
            ExportError: Nothing changed, PEFT has no form for what did, or the file does not reproduce it.
        """
        models, output, folder = self.models, self.output, self.work.finished
        records = {pair: self._record(index) for index, pair in enumerate(models.pairs)}
        changed = {pair: record for pair, record in records.items() if record.kind != "equal"}
        if not changed:
            raise ExportError(f"nothing in '{models.tuned.path}' has changed; there is nothing to convert")
        low = _as_factors(models, changed, output)
        full = [pair.param for pair in changed if pair.param not in low]
        refuse_full(output.target, full)
        most = largest_rank(output.target, None)
        ranks = {param: min(record.rank, most or record.rank) for param, record in low.items()}
        cut = {param for param, record in low.items() if record.rank > ranks[param]}
        if output.uniform_rank or output.target != "peft":
            ranks = same_rank(ranks)
        index = {pair.param: i for i, pair in enumerate(models.pairs)}
        files = {pair.param: pair.name for pair in models.pairs}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        written = write_adapter(
            folder,
            models.model,
            Lazy(list(low), lambda param: padded(limited(self.work.factors(index[param]), most), ranks[param])),
            Lazy(full, lambda param: models.tuned.read(files[param]), files),
            start=(name := output.base_model or str(start or "")),
        )
        slots = verify.check_structure(folder, models.model, list(low))
        rows, norms, lost, norm = [], [], 0.0, 0.0
        for pair, record in changed.items():
            if pair.param not in low:
                rows.append(ChangedTensor(pair.param, "full", record.shape, models.tuned.entry(pair.name).nbytes))
                continue
            if models.start is None:  # the change is known, and what it was added to is not
                dtype = self.work.factors(index[pair.param]).left.dtype
                left = Residuals(record.residual, record.residual, dtype)
            else:
                left = residuals(folder, slots[pair.param], pair, record, models.start, models.tuned)
            require_reached(output, pair, record, left)
            norms.append(record.norm)
            lost, norm = lost + (left.residual * record.norm) ** 2, norm + record.norm**2
            rows.append(
                ChangedTensor(
                    pair.param,
                    "low_rank",
                    record.shape,
                    written.factor_bytes[pair.param],
                    rank=ranks[pair.param],
                    residual=left.residual,
                    without_decay=left.without_decay,
                    decay=record.decay,
                    floor=record.floor,
                    full_rank=record.rank >= min(pair.shape or record.shape),
                )
            )
        require_allowed(output, rows, cut)
        faults, commands = check_written(folder, output.target)
        model_bytes = sum(file.path.stat().st_size for file in models.tuned.files.values())
        report = AdapterReport(
            source,
            tuple(rows),
            (lost / norm) ** 0.5 if norm else 0.0,
            written.nbytes,
            tuple(written.saved_modules),
            tuple(written.alongside),
            start=None if models.start is None else str(models.start.path),
            outputs=compare_logits(folder, start, models.tuned.path) if output.logits and start else None,
            equal=len(records) - len(changed),
            model_bytes=model_bytes,
            goal=words(output, [row for row in rows if row.kind == "low_rank"], norms),
            notes=(*notes(rows, output.goal, written.nbytes, model_bytes, models.ignored), *faults, *unnamed(name), *commands),
        )
        report.write(folder)
        add_tokenizer(folder, None, models.tuned.path)
        write_card(folder, report, written.config, transforms)
        return report

    def _record(self, index: int) -> ChangeRecord:
        found = self.work.find(index)
        if found is None:
            raise DataError(f"a file in '{self.work.folder}' was changed while it was in use; run the command again")
        return found


def _as_factors(models: Models, changed: Mapping[TensorPair, ChangeRecord], output: Output) -> dict[str, ChangeRecord]:
    """The changes that are saved as factors: all that were found, without those whose layer is smaller saved in full."""
    found = {pair: record for pair, record in changed.items() if record.kind == "low_rank"}
    whole = {p for p, record in found.items() if record.decay == 1.0 and smaller_in_full(models.model, p, record.rank)}
    if len(whole) == len(found) or output.target != "peft":  # PEFT needs one, others take nothing else
        whole = set()
    return {pair.param: record for pair, record in found.items() if pair not in whole}
