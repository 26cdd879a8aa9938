"""Model folders as transformers writes them: a config, and weights in one safetensors file or several with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lingrad.errors import DataError
from lingrad.files.tensorfile import TensorEntry, TensorFile

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class ModelFolder:
    """A folder with the weights of one model, read tensor by tensor.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        files: Its weight files by name.
        index: The content of the index file, where there are several weight files.

    Raises:
        DataError: It is not a model folder, or its weights are missing, truncated, tampered with or pickles.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            fault = "there is no such folder" if not path.is_dir() else "it has no config.json"
            raise DataError(f"'{path}' is not a model folder: {fault}; expected what model.save_pretrained(folder) writes")
        self.index: dict[str, Any] | None = None
        self.files: dict[str, TensorFile] = {}
        if (path / WEIGHTS).is_file():
            self.files[WEIGHTS] = TensorFile(path / WEIGHTS)
        elif (path / INDEX).is_file():
            self._read_index()
        else:
            raise DataError(_no_weights(path))
        self._where = {name: file for file in self.files.values() for name in file.entries}

    @property
    def names(self) -> list[str]:
        """The names of its tensors, sorted."""
        return sorted(self._where)

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor."""
        return self._where[name].entries[name]

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self._where[name].read(name)

    def rows(self, name: str, columns: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor that is read as a matrix with ``columns`` columns."""
        return self._where[name].rows(name, columns, start, stop)

    def fingerprint(self) -> dict[str, list[int]]:
        """What identifies this state of the folder: size and modification time of config, index and weight files."""
        files = [self.path / name for name in ("config.json", INDEX, *self.files)]
        found = {file.name: file.stat() for file in files if file.exists()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}

    def _read_index(self) -> None:
        path = self.path / INDEX
        try:
            self.index = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        where = self.index.get("weight_map") if isinstance(self.index, dict) else None
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            raise DataError(f"{path} has no 'weight_map' from tensors to files; copy or save the model again")
        for name in sorted(set(where.values())):
            if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
                raise DataError(f"{path} names '{name}'; expected safetensors files in the same folder")
            self.files[name] = TensorFile(self.path / name)
        held = {tensor: name for name, file in self.files.items() for tensor in file.entries}
        count = sum(len(file.entries) for file in self.files.values())
        if held != where or count != len(held):
            odd = sorted(key for key in {*held, *where} if held.get(key) != where.get(key)) or ["a tensor that occurs twice"]
            raise DataError(f"{path} does not fit its files, first at '{odd[0]}'; copy or save the model again")


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"'{path}' has no {WEIGHTS}, only '{pickles[0]}', a pickle, which could run code when it is loaded and is never "
            "read; if you trust it, load it with transformers and save it with save_pretrained"
        )
    return f"'{path}' has neither {WEIGHTS} nor {INDEX}; expected what model.save_pretrained(folder) writes"
