"""Model folders as transformers writes them: a config, and weights in one safetensors file or several with an index."""

from __future__ import annotations

import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import DataError
from lingrad.files.reading import open_plain, read_json, stamp
from lingrad.files.tensorfile import TensorEntry, TensorFile

# what tokenizers of transformers are saved in, chat templates too
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorPart(NamedTuple):
    """Where the elements of one tensor of a file are in a parameter that is stored in several, or under another name.

    Args:
        name: The tensor's name in the file.
        shape: Its shape.
        strides: Its strides in the parameter, in elements.
        offset: Where it begins in the parameter, in elements.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The part of a contiguous parameter, as a view."""
        return whole.as_strided(self.shape, self.strides, self.offset)


class ModelFolder:
    """A folder with the weights of one model, read tensor by tensor.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        files: Its weight files by name.
        parts: Parameter -> the tensors that it is stored as, of those that `compose` was called for.

    Raises:
        DataError: It is not a model folder, or its weights are missing, truncated, tampered with or pickles.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            fault = "there is no such folder" if not path.is_dir() else "it has no config.json"
            raise DataError(f"'{path}' is not a model folder: {fault}; expected what model.save_pretrained(folder) writes")
        self.files = open_weights(path)
        if not self.files:
            raise DataError(_no_weights(path))
        self._where = {name: file for file in self.files.values() for name in file.entries}
        self.parts: dict[str, tuple[TensorPart, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._last: tuple[str, Tensor] | None = None

    def compose(self, name: str, shape: tuple[int, ...], parts: tuple[TensorPart, ...]) -> None:
        """Read some tensors of the files as the one parameter that they are in the model; they have no names of their own then.

        Args:
            name: The parameter.
            shape: Its shape.
            parts: The tensors, all of one dtype; every element is in one of them.
        """
        self.parts[name], self._shapes[name] = parts, shape

    @property
    def names(self) -> list[str]:
        """The names of its tensors, sorted."""
        hidden = {part.name for parts in self.parts.values() for part in parts}
        return sorted({*self._where} - hidden | {*self.parts})

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor."""
        if name in self.parts:
            first = self.parts[name][0].name
            return self._where[first].entries[first]._replace(shape=self._shapes[name])
        return self._where[name].entries[name]

    def read(self, name: str) -> Tensor:
        """A tensor. One that is composed is kept until the next one is read, and must not be written to."""
        if name not in self.parts:
            return self._where[name].read(name)
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is in memory
            whole = torch.empty(self._shapes[name], dtype=self.entry(name).dtype)
            for part in self.parts[name]:
                part.of(whole).copy_(self._where[part.name].read(part.name))
            self._last = name, whole
        return self._last[1]

    def rows(self, name: str, columns: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor that is read as a matrix with ``columns`` columns."""
        if name in self.parts:
            return self.read(name).view(-1, columns)[start:stop]
        return self._where[name].rows(name, columns, start, stop)

    def digest(self, name: str) -> str:
        """A checksum of a tensor's elements."""
        if name in self.parts:
            return blake2b(b"".join(self.digest(part.name).encode() for part in self.parts[name]), digest_size=16).hexdigest()
        return self._where[name].digest(name)

    def fingerprint(self) -> dict[str, list[Any]]:
        """What identifies the folder as it is now: size, time of change and head of config, index and weight files."""
        files = [self.path / name for name in ("config.json", INDEX, *self.files)]
        return {file.name: _identify(file) for file in sorted(files) if file.exists()}


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy a tokenizer from a model's folder.

    Args:
        source: The model's folder.
        folder: The folder to copy into.

    Returns:
        The names of the files; none where there is no tokenizer.
    """
    found = [name for name in TOKENIZER if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, folder / name)
    return found


def weight_files(folder: Path, single: str = WEIGHTS) -> list[str]:
    """The names of the files that a folder's weights are in: one, or those that an index lists.

    Args:
        folder: A model's or a checkpoint's folder.
        single: The name of the file where there is one; an index has ``.index.json`` after it.

    Returns:
        The names, sorted; none where there is neither. The files themselves need not exist.

    Raises:
        DataError: The index cannot be read, or lists other than such files in the folder.
    """
    if (folder / single).is_file():
        return [single]
    index = folder / f"{single}.index.json"
    return sorted(set(_listed(index).values())) if index.is_file() else []


def open_weights(folder: Path) -> dict[str, TensorFile]:
    """The weight files of a model's or a checkpoint's folder.

    Args:
        folder: The folder.

    Returns:
        Name -> file; none where it has no safetensors.

    Raises:
        DataError: A file or the index is damaged, or they do not fit each other.
    """
    files = {name: TensorFile(folder / name) for name in weight_files(folder)}
    if files and WEIGHTS not in files:
        listed = _listed(folder / INDEX)
        found = {tensor: name for name, file in files.items() for tensor in file.entries}
        count = sum(len(file.entries) for file in files.values())
        if found != listed or count != len(found):
            odd = sorted(key for key in {*found, *listed} if found.get(key) != listed.get(key)) or [
                "a tensor that occurs twice"
            ]
            raise DataError(f"{folder / INDEX} does not fit its files, first at '{odd[0]}'; copy or save the model again")
    return files


def _identify(file: Path) -> list[Any]:
    try:
        with open_plain(file) as opened:
            found, head = stamp(opened), opened.read(8)
            length = int.from_bytes(head, "little") if file.suffix == ".safetensors" else found.size
            head += opened.read(min(length, found.size))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    return [found.size, found.time, blake2b(head, digest_size=16).hexdigest()]


def _listed(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index lists them."""
    try:
        content = read_json(index, foreign=True)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {index}: {error}") from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise DataError(f"{index} has no 'weight_map' from tensors to files; copy or save the model again")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for name in sorted(set(where.values())):
        if Path(name).name != name or "\0" in name or not name.endswith(suffix):
            raise DataError(f"{index} names '{name}'; expected {suffix.removeprefix('.')} files in the same folder")
    return where


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"'{path}' has no {WEIGHTS}, only '{pickles[0]}', a pickle, which could run code when it is loaded and is never "
            "read; if you trust it, load it with transformers and save it with save_pretrained"
        )
    return f"'{path}' has neither {WEIGHTS} nor {INDEX}; expected what model.save_pretrained(folder) writes"
