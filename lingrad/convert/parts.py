"""Finished modules of an unfinished conversion: a hidden folder beside the one to be, so that a kill loses one module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lingrad._files import write_whole
from lingrad.errors import DataError
from lingrad.factors import Factors
from lingrad.tensorfile import TensorFile, whole, write_tensors

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Record:
    """What became of one tensor.

    Args:
        name: Its name in the weight files.
        kind: ``equal``, ``full`` (saved as it is in TUNED) or ``low_rank``.
        shape: Its shape.
        rank: Columns of its factors.
        kept: The share of BASE in TUNED, where decoupled decay was recognised; 1 elsewhere.
        norm: |TUNED - BASE|_F.
        rest: What the factors leave, as a share of ``norm``; of TUNED - kept * BASE where all of it was wanted.
        floor: What rounding TUNED to its dtype once leaves, as a share of ``norm``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int = 0
    kept: float = 1.0
    norm: float = 0.0
    rest: float = 0.0
    floor: float = 0.0


class Parts:
    """The hidden folder of one conversion.

    Args:
        out: The folder to be.
        identity: What is converted, and how: plain values. A folder left by the same conversion is gone on with.

    Raises:
        DataError: The folder was left by another conversion.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out.parent / f".{out.name}.partial"
        self._records: dict[int, Record] = {}
        text = json.dumps(identity, indent=2, sort_keys=True)
        manifest = self.folder / MANIFEST
        if manifest.exists():
            self._check(manifest, json.loads(text))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(manifest, text.encode())

    @property
    def finished(self) -> Path:
        """Where the finished folder is put together."""
        return self.folder / "finished"

    def find(self, index: int) -> Record | None:
        """The record of a tensor that is done; a file that is not whole counts for nothing.

        Args:
            index: The tensor's number.

        Returns:
            The record, or None.
        """
        try:
            fields = json.loads(TensorFile(self._path(index)).metadata["record"])
            self._records[index] = Record(**fields | {"shape": tuple(fields["shape"])})
        except (DataError, KeyError, TypeError, ValueError):
            return None
        return self._records[index]

    def keep(self, index: int, record: Record, factors: Factors | None = None) -> None:
        """Note that a tensor is done.

        Args:
            index: The tensor's number.
            record: What became of it.
            factors: Its factors.
        """
        tensors: dict[str, Tensor] = {}
        if factors is not None:
            tensors = {"left": factors.left, "right": factors.right}
        write_tensors(self._path(index), whole(tensors), {"record": json.dumps(asdict(record), sort_keys=True)})

    def factors(self, index: int) -> Factors:
        """The factors of a tensor that is done."""
        file = TensorFile(self._path(index))
        return Factors(file.read("left"), file.read("right"))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _check(self, manifest: Path, identity: Mapping[str, Any]) -> None:
        try:
            was = json.loads(manifest.read_text())
        except ValueError:
            was = None
        remedy = f"remove '{self.folder}', or name another folder with --out"
        if not isinstance(was, dict):
            raise DataError(f"'{manifest}' cannot be read; {remedy}")
        for key in sorted({*was, *identity}):
            if was.get(key) != identity.get(key):
                raise DataError(
                    f"'{self.folder}' holds unfinished work of another conversion, which differs in '{key}': {was.get(key)} "
                    f"there, {identity.get(key)} now; {remedy}"
                )
