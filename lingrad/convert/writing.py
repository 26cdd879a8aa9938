"""Finished modules put together: the adapter's files, read again and compared, and the report beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lingrad.console import Tick
from lingrad.convert import verify
from lingrad.convert.lowrank import Goal
from lingrad.convert.merge import write_model
from lingrad.convert.report import FILE, Report, Row
from lingrad.convert.tensors import Pair
from lingrad.convert.work import Parts, Record
from lingrad.errors import DataError, ExportError
from lingrad.files.atomic import write_whole
from lingrad.files.model_folder import ModelFolder
from lingrad.maps.factors import Factors
from lingrad.peft.write import write_adapter

Finder = Callable[[Pair], tuple[Record, Factors | None]]

T = TypeVar("T")


@dataclass
class Job:
    """One conversion.

    Args:
        base: One folder; None where what was learned is known without it.
        tuned: The other.
        model: Their model, on the meta device.
        pairs: Its tensors.
        work: Where finished ones are kept.
    """

    base: ModelFolder | None
    tuned: ModelFolder
    model: nn.Module
    pairs: list[Pair]
    work: Parts

    def find(self, find: Finder, tick: Tick | None) -> None:
        """Find the change of every tensor that is not done yet.

        Args:
            find: Gives the record and the factors of one.
            tick: Called after each.
        """
        for index, pair in enumerate(self.pairs):
            if self.work.find(index) is None:
                self.work.keep(index, *find(pair))
            if tick is not None:
                tick(index + 1, len(self.pairs), pair.name)

    @contextmanager
    def base_for(self, decayed: Path | None, tick: Tick | None) -> Iterator[Path | None]:
        """The base that the adapter is for; a decayed one is written first, and removed where what follows fails.

        Args:
            decayed: Where to write it; None for BASE itself.
            tick: Called after each of its tensors.

        Yields:
            Its folder; None where it is not known.

        Raises:
            ExportError: No decay was recognised.
        """
        base = self.base
        if decayed is None or base is None:
            yield None if base is None else base.path
            return
        kept = {pair.name: self._record(index).kept for index, pair in enumerate(self.pairs)}
        if all(share == 1.0 for share in kept.values()):
            raise ExportError("no decoupled decay was recognised, and BASE serves as it is; leave --decayed-base out")

        def value(name: str) -> Tensor:
            weight, share = base.read(name), kept.get(name, 1.0)
            return weight if share == 1.0 else (weight.double() * share).to(weight.dtype)

        write_model(base, decayed, value, tick)
        try:
            yield decayed
        except BaseException:
            shutil.rmtree(decayed, ignore_errors=True)
            raise

    def write(self, goal: Goal, base: Path | None, uniform_rank: bool, logits: bool) -> Report:
        """Write the adapter, read it again, compare, and write the report beside it.

        Args:
            goal: What was asked for.
            base: The folder that the adapter is for.
            uniform_rank: Whether all get the largest rank.
            logits: Whether to compare logits.

        Returns:
            The report.

        Raises:
            ExportError: Nothing changed, or PEFT has no form for what did, or the file does not give it again.
        """
        records = {pair: self._record(index) for index, pair in enumerate(self.pairs)}
        changed = {pair: record for pair, record in records.items() if record.kind != "equal"}
        if not changed:
            raise ExportError(f"nothing in '{self.tuned.path}' has changed; there is nothing to convert")
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
            base=str(base or ""),
        )
        slots = verify.check_structure(folder, self.model, list(where))
        rows = []
        lost = norm = 0.0
        for pair, record in changed.items():
            row = Row(pair.param, record.kind, record.shape)
            if pair in low:
                if self.base is None:  # what was learned is known, and what it was added to is not
                    left = verify.Residuals(record.rest, record.rest, self.work.factors(where[pair.param]).left.dtype)
                else:
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
            goal=goal.words,
            searched=goal.exact,
            logits=verify.compare_logits(folder, base, self.tuned.path) if logits and base else None,
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
