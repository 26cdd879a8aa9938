"""The finished tensors of an unfinished conversion, in a hidden folder next to the result, so that a kill loses one tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from lingrad.errors import DataError
from lingrad.files.atomic import refuse_existing, write_whole
from lingrad.files.reading import memory_of, read_json
from lingrad.files.tensorfile import TensorFile, in_memory, write_tensors
from lingrad.maps.factors import Factors

MANIFEST, LOCK = "manifest.json", "lock.lingrad"
_OURS = re.compile(r"lock\.lingrad(\..*)?|finished|\.?(\d{5}\.safetensors|manifest\.json)(\..*)?")  # and their temporary files


@dataclass(frozen=True)
class ChangeRecord:
    """The change of one tensor.

    Args:
        name: Its name in the weight files.
        kind: ``equal``, ``full`` (saved in full) or ``low_rank``.
        shape: Its shape.
        rank: Columns of its factors.
        decay: The factor by which decoupled weight decay has multiplied START; 1 where none was recognised.
        norm: |TUNED - START|_F.
        residual: What the factors leave, as a share of ``norm``; of TUNED - decay * START where all of that was asked for.
        floor: What rounding TUNED to its dtype once leaves, as a share of ``norm``; None where it was not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int = 0
    decay: float = 1.0
    norm: float = 0.0
    residual: float = 0.0
    floor: float | None = None


class WorkFolder:
    """The hidden folder of one conversion.

    Args:
        out: The folder that the conversion will write.
        identity: What is converted, and how: plain values. A folder left by the same conversion is resumed.

    Raises:
        DataError: The folder was left by another conversion, is in use by a running one, or is something else.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out.parent / f".{out.name}.partial"
        text = json.dumps(identity, indent=2, sort_keys=True)
        manifest = self.folder / MANIFEST
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
        """Let another process resume from here."""
        self._lock.release()

    @property
    def finished(self) -> Path:
        """Where the result is assembled."""
        return self.folder / "finished"

    def find(self, index: int, inputs: str | None = None) -> ChangeRecord | None:
        """The record of a tensor that is done; a file that is not as it was written is ignored.

        Args:
            index: The tensor's number.
            inputs: A checksum of what the tensor was computed from, which must be that of the file; None for any.

        Returns:
            The record, or None.
        """
        try:
            file = TensorFile(self._path(index))
            text, of = file.metadata["record"], file.metadata["inputs"]
            parts = [file.digest(name) for name in sorted(file.entries)]
            if file.metadata["checksum"] != _checksum(text, of, parts) or inputs not in (None, of):
                return None
            fields = json.loads(text)
            return ChangeRecord(**fields | {"shape": tuple(fields["shape"])})
        except (DataError, KeyError, TypeError, ValueError, RecursionError):
            return None

    def store(self, index: int, record: ChangeRecord, factors: Factors | None = None, inputs: str = "") -> None:
        """Store a tensor that is done.

        Args:
            index: The tensor's number.
            record: Its change.
            factors: Its factors.
            inputs: A checksum of what it was computed from.
        """
        tensors: dict[str, Tensor] = {}
        if factors is not None:
            tensors = {"left": factors.left.cpu().contiguous(), "right": factors.right.cpu().contiguous()}
        text = json.dumps(asdict(record), sort_keys=True)
        parts = [blake2b(memory_of(tensor), digest_size=16).hexdigest() for _, tensor in sorted(tensors.items())]
        metadata = {"record": text, "inputs": inputs, "checksum": _checksum(text, inputs, parts)}
        write_tensors(self._path(index), in_memory(tensors), metadata)

    def factors(self, index: int) -> Factors:
        """The factors of a tensor that is done."""
        file = TensorFile(self._path(index))
        return Factors(file.read("left"), file.read("right"))

    def _clear(self) -> None:
        """Remove what is left of a process that was killed while it made or removed the folder, and nothing else."""
        found = sorted(self.folder.iterdir())
        for path in found:
            if _OURS.fullmatch(path.name) is None:
                raise DataError(
                    f"'{self.folder}' is for unfinished work, and contains '{path.name}', which is something else; move it, or "
                    "name another folder with --out"
                )
        for path in found:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _locked(self, out: Path) -> filelock.BaseFileLock:
        """The lock, acquired; the operating system releases it when the process ends, however it ends."""
        path = self.folder / LOCK
        lock = filelock.FileLock(path)
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                if path.exists():
                    raise DataError(f"another process is writing '{out}' now; wait for it, or name another folder") from None
                continue  # the other process has finished, and removed the folder
            except FileNotFoundError:
                continue
            except (OSError, NotImplementedError):  # a file system without locks
                return lock
            if path.exists():
                return lock
            lock.release()  # the folder was removed between the opening of the file and its locking

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _check(self, manifest: Path, identity: Mapping[str, Any]) -> None:
        try:
            was = read_json(manifest)
        except (ValueError, RecursionError):
            was = None
        remedy = f"remove '{self.folder}', or name another folder with --out"
        if not isinstance(was, dict):
            raise DataError(f"'{manifest}' cannot be read; {remedy}")
        for key in sorted({*was, *identity}):
            if was.get(key) != identity.get(key):
                raise DataError(
                    f"'{self.folder}' has unfinished work of another conversion, which differs in '{key}': {was.get(key)} "
                    f"there, {identity.get(key)} now; {remedy}"
                )


def _checksum(*parts: Any) -> str:
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@contextmanager
def unfinished(out: Path, identity: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """The hidden folder of a conversion, removed once the block has published its result.

    Args:
        out: The folder that the conversion will write.
        identity: What is converted, and how.

    Yields:
        The hidden folder.

    Raises:
        DataError: It was left by another conversion, or cannot be written.
    """
    try:
        work = WorkFolder(out, identity)
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
            f"cannot write '{out}': {error}; what was finished is stored, and the same command resumes from it"
        ) from error
