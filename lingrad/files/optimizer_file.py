"""Optimizer states in files written by torch.save: nothing in them is executed, and a tensor is read when it is asked for.

The file is a zip: a pickle that describes the tensors, and one record for each. It is never mapped: a file that is cut while it
is mapped ends the process, and one that is written meanwhile gives parts of two steps.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import CheckpointError, DataError
from lingrad.files.pickled import Inert, Name, StoredStorage, StoredTensor, interpret
from lingrad.files.reading import Stamp, memory_of, open_plain, open_same, stamp

__all__ = ["FILE", "Inert", "identify", "load_state"]

FILE = "optimizer.pt"
_LARGEST_PICKLE = 256 * 2**20  # bytes; a state of 10^5 tensors has 20 MB
_LOCAL_HEADER = 30  # bytes of a zip's header before a record, up to the two lengths at its end


def load_state(path: Path, inert: Sequence[str] = ()) -> dict[str, Any]:
    """Read an optimizer's state dict.

    Args:
        path: The file, or a checkpoint's folder that contains it as ``optimizer.pt``.
        inert: Full names of classes whose objects are read as `Inert`; all classes but these are refused.

    Returns:
        ``state`` and ``param_groups``, tensors on the CPU. The entries of each parameter are read from the file whenever they
        are looked up, which raises `CheckpointError` once the file has changed.

    Raises:
        DataError: There is no such file.
        CheckpointError: It is damaged, is not an optimizer's state, or asks to run code.
    """
    file = _file(path)
    try:
        records = _Records(file)
        found = interpret(records.pickle, inert)
        records.check(found)
    except Exception as error:  # a damaged or hostile file may raise any exception
        raise CheckpointError(
            f"'{file}' cannot be read as plain tensors and numbers, and nothing else is read: it is truncated, was written by "
            f"another program, or asks to run code ({type(error).__name__}: {str(error)[:200]})"
        ) from None
    parts = (found.get("state"), found.get("param_groups")) if isinstance(found, dict) else (None, None)
    if not isinstance(parts[0], dict) or not isinstance(parts[1], list):
        raise CheckpointError(f"'{file}' is not an optimizer's state dict, which has 'state' and 'param_groups'")
    intact = all(isinstance(entries, dict) for entries in parts[0].values()) and all(map(_is_group, parts[1]))
    if not intact:
        raise CheckpointError(
            f"'{file}' is damaged: expected dicts in 'state', and in 'param_groups' dicts with a list 'params'"
        )
    return {
        "state": {index: _Entries(records, entries) for index, entries in parts[0].items()},
        "param_groups": [records.value(group) for group in parts[1]],
    }


def identify(path: Path) -> list[Any]:
    """What identifies the content of an optimizer's file.

    Args:
        path: The file, or a checkpoint's folder.

    Returns:
        Its size, its time of change, and a digest of its directory, which has a checksum of each record.

    Raises:
        DataError: There is no such file, or it is no zip.
    """
    file = _file(path)
    try:
        records = _Records(file)
    except Exception as error:  # as in `load_state`
        raise DataError(f"cannot read '{file}': {error}") from None
    directory = [[info.filename, info.file_size, info.CRC] for info in records.infos.values()]
    return [records.stamp.size, records.stamp.time, blake2b(repr(directory).encode(), digest_size=16).hexdigest()]


def _file(path: Path) -> Path:
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"there is no '{file}'; expected what torch.save(optimizer.state_dict()) writes")
    return file


def _is_group(group: Any) -> bool:
    params = group.get("params") if isinstance(group, dict) else None
    return isinstance(params, list) and all(type(index) is int for index in params)


class _Records:
    """The records of one file, read one at a time.

    Args:
        path: The file.

    Attributes:
        path: The file.
        stamp: What identifies the file that was opened.
        infos: Record -> its entry in the zip's directory.
        pickle: The pickle.

    Raises:
        ValueError: It is not what torch.save writes. Others come from zipfile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_plain(path) as file:
            self.stamp: Stamp = stamp(file)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            folder = infos[0].filename.partition("/")[0] if infos else ""
            self.infos = {info.filename.removeprefix(f"{folder}/"): info for info in infos}
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
            raise ValueError("its records are compressed, which torch.save never does")
        if "data.pkl" not in self.infos or self.infos["data.pkl"].file_size > _LARGEST_PICKLE:
            raise ValueError("it has no data.pkl, or a far too large one")
        self.pickle = self._bytes("data.pkl")
        if "byteorder" in self.infos and self._bytes("byteorder") != sys.byteorder.encode():
            raise ValueError("it was written on a machine with another byte order")

    def check(self, found: Any) -> None:
        """Make sure that every tensor's record has the size that the pickle says.

        Args:
            found: What the pickle holds.

        Raises:
            ValueError: One has not.
        """
        for tensor in _tensors(found):
            info = self.infos.get(f"data/{tensor.storage.key}")
            size = None if info is None else info.file_size
            if size != tensor.nbytes:
                raise ValueError(f"the record data/{tensor.storage.key} has {size} bytes; expected {tensor.nbytes:,}")

    def value(self, found: Any) -> Any:
        """A value with its tensors in memory, each in its own.

        Args:
            found: A part of what the pickle holds.

        Returns:
            The same with tensors.

        Raises:
            CheckpointError: The file has changed since it was opened, or cannot be read.
        """
        return self._value(found, {})

    def _value(self, found: Any, made: dict[int, Any]) -> Any:
        if id(found) in made:  # of a list that occurs twice, or within itself
            return made[id(found)]
        if isinstance(found, StoredTensor):
            return self._tensor(found)
        if isinstance(found, dict):
            new: dict[Any, Any] = {}
            made[id(found)] = new
            new.update({key: self._value(value, made) for key, value in found.items()})
            return new
        if isinstance(found, list):
            listed: list[Any] = []
            made[id(found)] = listed
            listed.extend(self._value(value, made) for value in found)
            return listed
        if isinstance(found, tuple):
            made[id(found)] = tuple(self._value(value, made) for value in found)
            return made[id(found)]
        if isinstance(found, Inert):
            made[id(found)] = Inert()
            vars(made[id(found)]).update(self._value(vars(found), made))
            return made[id(found)]
        return found

    def _tensor(self, tensor: StoredTensor) -> Tensor:
        flat = torch.empty(tensor.span, dtype=tensor.dtype)
        self._read(f"data/{tensor.storage.key}", tensor.offset * tensor.dtype.itemsize, memory_of(flat))
        return flat.as_strided(tensor.shape, tensor.strides)

    def _bytes(self, record: str) -> bytes:
        found = bytearray(self.infos[record].file_size)
        self._read(record, 0, memoryview(found))
        return bytes(found)

    def _read(self, record: str, offset: int, target: memoryview) -> None:
        if not target.nbytes:
            return
        begin = self.infos[record].header_offset
        try:
            with open_same(self.path, self.stamp) as file:
                file.seek(begin)
                mark, name, extra = struct.unpack("<4s22x2H", file.read(_LOCAL_HEADER))
                if mark != b"PK\3\4" or file.read(name) != self.infos[record].orig_filename.encode():
                    raise CheckpointError(f"'{self.path}' is damaged before '{record}'; save or copy it again")
                file.seek(begin + _LOCAL_HEADER + name + extra + offset)
                if file.readinto(target) != target.nbytes:
                    raise CheckpointError(f"'{self.path}' is truncated in '{record}'; save or copy it again")
        except (OSError, struct.error) as error:
            raise CheckpointError(f"cannot read '{record}' of '{self.path}': {getattr(error, 'strerror', error)}") from error


class _Entries(Mapping[str, Any]):
    """The entries of one parameter, read when they are looked up."""

    def __init__(self, records: _Records, found: dict[Any, Any]) -> None:
        self._records, self._found = records, found

    def __getitem__(self, key: Any) -> Any:
        return self._records.value(self._found[key])

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[Any]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _tensors(found: Any) -> Iterator[StoredTensor]:
    """The tensors of a pickle, each container looked at once."""
    seen: set[int] = set()
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, (Name, StoredStorage)):
            raise ValueError(f"Unsupported GLOBAL {value}")
        elif isinstance(value, (dict, list, tuple, Inert)) and id(value) not in seen:
            seen.add(id(value))
            inner = vars(value) if isinstance(value, Inert) else value
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)
