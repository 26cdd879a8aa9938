"""Finished modules of an unfinished conversion: a hidden folder beside the one to be, so that a kill loses one module."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from lingrad.errors import DataError
from lingrad.files.atomic import refuse_existing, write_whole
from lingrad.files.tensorfile import TensorFile, whole, write_tensors
from lingrad.maps.factors import Factors

try:  # not on Windows
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

MANIFEST, LOCK = "manifest.json", "lock.lingrad"
_OURS = re.compile(r"lock\.lingrad|finished|\.?(\d{5}\.safetensors|manifest\.json)(\..*)?")  # and their temporary files


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
        DataError: The folder was left by another conversion, is used by one that runs, or is something else.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out.parent / f".{out.name}.partial"
        self._records: dict[int, Record] = {}
        text = json.dumps(identity, indent=2, sort_keys=True)
        manifest = self.folder / MANIFEST
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked(out)
        try:
            refuse_existing(out)  # another process may have finished it
            if manifest.exists():
                self._check(manifest, json.loads(text))
            else:
                self._clear()
                write_whole(manifest, text.encode())
        except BaseException:
            if not manifest.exists():
                (self.folder / LOCK).unlink(missing_ok=True)
                if not list(self.folder.iterdir()):
                    self.folder.rmdir()
            self.close()
            raise

    def close(self) -> None:
        """Let another process go on from here."""
        self._lock.close()

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

    def _clear(self) -> None:
        """Remove what a process that was killed while it made or removed the folder has left, and nothing else."""
        found = sorted(self.folder.iterdir())
        for path in found:
            if _OURS.fullmatch(path.name) is None:
                raise DataError(
                    f"'{self.folder}' is where unfinished work is kept, and holds '{path.name}', which is none; move it, or "
                    "name another folder with --out"
                )
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _locked(self, out: Path) -> BinaryIO:
        """The lock's file, open; the lock goes with the process, however it ends."""
        while True:
            file = (self.folder / LOCK).open("ab")
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise DataError(f"another process is writing '{out}' now; wait for it, or name another folder") from None
            except OSError:  # a file system without locks
                return file
            try:
                if os.path.samestat(os.fstat(file.fileno()), (self.folder / LOCK).stat()):
                    return file
            except FileNotFoundError:  # who held it has finished, and removed the folder
                self.folder.mkdir(parents=True, exist_ok=True)
            file.close()

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
