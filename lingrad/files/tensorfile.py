"""Safetensors files, tensor by tensor: the header is checked to the byte, tensors are read and written one at a time.

The format is eight bytes with the header's length, a JSON header with each tensor's dtype, shape and offsets, and the data.
Nothing in a file is trusted before its header fits its length exactly; only what was asked for is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import DataError
from lingrad.files.atomic import new_file
from lingrad.files.reading import memory_of, open_plain, open_same, parse_json, stamp

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_DIMENSIONS = 64  # torch's own limit
_LARGEST_HEADER = 100_000_000  # as in the safetensors package
_BLOCK = 1 << 20  # elements that a checksum reads at once


class TensorEntry(NamedTuple):
    """One tensor in a file.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        begin: Its first byte, counted from the start of the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """A tensor to write, made when it is written.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        make: Makes it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class TensorFile:
    """A safetensors file with a checked header; tensors are read when asked for.

    Args:
        path: The file.

    Attributes:
        path: The file.
        entries: Name -> dtype, shape and position.
        metadata: The strings in the header.

    Raises:
        DataError: The file is missing or truncated, or its header does not fit it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_plain(path) as file:
                self._stamp = stamp(file)
                size = self._stamp.size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                    raise _damaged(path, f"its header would be {length:,} bytes long, and the file is {size:,}")
                header = file.read(length)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        self.entries, self.metadata = _parse(path, header, size)

    def read(self, name: str) -> Tensor:
        """A tensor, in its own memory."""
        entry = self.entries[name]
        return self._read(entry, entry.begin, prod(entry.shape)).view(entry.shape)

    def rows(self, name: str, columns: int, start: int, stop: int) -> Tensor:
        """Some rows of a tensor that is read as a matrix [m, n].

        Args:
            name: Its name.
            columns: n; the elements are in row-major order.
            start: The first row.
            stop: The row after the last.

        Returns:
            [stop - start, n], in its own memory.
        """
        entry = self.entries[name]
        found = self._read(entry, entry.begin + start * columns * entry.dtype.itemsize, (stop - start) * columns)
        return found.view(stop - start, columns)

    def digest(self, name: str) -> str:
        """A checksum of a tensor's elements."""
        entry = self.entries[name]
        found, count = blake2b(digest_size=16), prod(entry.shape)
        for first in range(0, count, _BLOCK):
            block = self._read(entry, entry.begin + first * entry.dtype.itemsize, min(_BLOCK, count - first))
            found.update(memory_of(block))
        return found.hexdigest()

    def _read(self, entry: TensorEntry, begin: int, count: int) -> Tensor:
        found = torch.empty(count, dtype=entry.dtype)
        try:
            with open_same(self.path, self._stamp) as file:
                file.seek(begin)
                if count and file.readinto(memory_of(found)) != found.nbytes:
                    raise _damaged(self.path, "it became shorter while it was read")
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        return found


def write_tensors(path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file one tensor after the other, through a temporary file next to it.

    Args:
        path: The file; replaced if it is there.
        pieces: Name -> tensor. Equal pieces and metadata give equal bytes.
        metadata: Strings for the header.

    Returns:
        The path. Errors of the operating system are not translated; no incomplete file is left.

    Raises:
        DataError: The format does not have the dtype of a tensor, or a tensor does not match its piece.
    """
    order = sorted(pieces, key=lambda name: (-pieces[name].dtype.itemsize, name))  # each begins at a multiple of its dtype
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        dtype, shape, _ = pieces[name]
        if dtype not in _NAMES:
            raise DataError(f"'{name}' is {dtype}, which safetensors files cannot hold")
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor, (dtype, shape, _) = pieces[name].make(), pieces[name]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
                raise DataError(f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}; its piece has {dtype} {tuple(shape)}")
            flat = tensor.detach().cpu().contiguous()
            if flat.numel():
                file.write(memory_of(flat))
            del tensor, flat  # before the next one is made
    return path


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Pieces of tensors that are already in memory."""

    def piece(tensor: Tensor) -> Piece:
        return Piece(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    return {name: piece(tensor) for name, tensor in tensors.items()}


def _parse(path: Path, header: bytes, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read a header; every byte of the file must belong to exactly one tensor, and every name occur once."""
    try:
        found = parse_json(header.decode(), pairs=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON that names each tensor once ({error})") from error
    if not isinstance(found, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "the metadata in its header are not strings")
    entries: dict[str, TensorEntry] = {}
    extents = []
    for name, value in found.items():
        dtype, shape, offsets = _fields(path, name, value)
        # before numbers of any length are multiplied; an empty tensor with a side that large is no tensor of a model
        if len(shape) > _MOST_DIMENSIONS or max(shape, default=0) > max(size, 2**32):
            raise _damaged(path, f"'{name}' has {len(shape)} dimensions, the largest of {max(shape):,}")
        entries[name] = TensorEntry(dtype, tuple(shape), 8 + len(header) + offsets[0])
        if offsets[1] - offsets[0] != entries[name].nbytes:
            raise _damaged(path, f"'{name}' is {list(shape)} {dtype}, and its offsets span {offsets[1] - offsets[0]:,} bytes")
        extents.append((offsets[0], offsets[1], name))
    end = 0
    for begin, stop, name in sorted(extents):
        if begin != end:
            raise _damaged(path, f"'{name}' begins at byte {begin:,} of the data; expected {end:,}")
        end = stop
    if 8 + len(header) + end != size:
        raise _damaged(path, f"its header describes {8 + len(header) + end:,} bytes, and the file is {size:,}")
    return entries, metadata


def _fields(path: Path, name: str, value: Any) -> tuple[torch.dtype, list[int], list[int]]:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"'{name}' is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DataError(f"{path}: '{name}' has the dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise _damaged(path, f"shape and offsets of '{name}' are {shape} and {offsets}")
    if len(offsets) != 2:
        raise _damaged(path, f"the offsets of '{name}' are {offsets}")
    return DTYPES[dtype], shape, offsets


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' occurs twice")
        found[name] = value
    return found


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} is truncated, damaged, or not a safetensors file: {what}; copy or save it again")
