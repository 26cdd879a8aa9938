"""Model folders as transformers writes them: a config, and weights in one safetensors file or several with an index."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lingrad.errors import DataError, did_you_mean, optional
from lingrad.files.tensorfile import Entry, TensorFile

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# What two configs of one architecture may differ in: names, how a model is run, what it was trained with. An adapter changes
# none of it, and neither do they change what the weights mean.
_HARMLESS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


class ModelFolder:
    """A folder with the weights of one model, read tensor by tensor.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        files: Its weight files by name.
        index: The index file's content, where there are several.

    Raises:
        DataError: It is none, or its weights are missing, cut off, tampered with or pickles.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            held = "there is no such folder" if not path.is_dir() else "it has no config.json"
            raise DataError(f"'{path}' is no model folder: {held}; expected what model.save_pretrained(folder) writes")
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

    def entry(self, name: str) -> Entry:
        """Dtype and shape of a tensor."""
        return self._where[name].entries[name]

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self._where[name].read(name)

    def rows(self, name: str, columns: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor that is read as a matrix of so many columns."""
        return self._where[name].rows(name, columns, start, stop)

    def fingerprint(self) -> dict[str, list[int]]:
        """What tells this state of the folder from another: length and time of change of each of its files that matter."""
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


def refuse_other_model(base: ModelFolder, tuned: ModelFolder, tied: Collection[str] = ()) -> None:
    """Make sure that two folders hold the same architecture, tensor by tensor.

    Args:
        base: One.
        tuned: The other.
        tied: Names of tensors that are another one in the model, so that a folder may lack them.

    Raises:
        DataError: They are one folder, or differ in a config entry that matters, or in a tensor's name or shape.
    """
    if base.path.resolve() == tuned.path.resolve():
        raise DataError(f"BASE and TUNED are the same folder, '{base.path}'")
    was, now = (_config(folder.path) for folder in (base, tuned))
    for key in sorted({*was, *now}, key=lambda key: (key not in ("model_type", "architectures"), key)):
        harmless = key in _HARMLESS or key.endswith(("dropout", "drop", "pdrop"))
        if not harmless and was.get(key) != now.get(key):
            raise DataError(
                f"the configs differ in '{key}': {_short(was.get(key))} in '{base.path}', {_short(now.get(key))} in "
                f"'{tuned.path}'; expected the model that the training started from and what became of it"
            )
    for ours, theirs, wanted in ((base, tuned, "extra"), (tuned, base, "missing")):
        odd = sorted({*theirs.names} - {*ours.names} - {*tied})
        if odd:
            holder = f"only '{theirs.path}' holds '{odd[0]}' ({wanted}{f', and {len(odd) - 1} more' if odd[1:] else ''})"
            near = did_you_mean(odd[0], {*ours.names} - {*theirs.names})
            raise DataError(f"the two do not have the same tensors: {holder}{near} Save both from one class of model")
    for name in sorted({*base.names} & {*tuned.names}):
        if base.entry(name).shape != tuned.entry(name).shape:
            shapes = [list(folder.entry(name).shape) for folder in (base, tuned)]
            raise DataError(f"'{name}' is {shapes[0]} in '{base.path}' and {shapes[1]} in '{tuned.path}'")


def _config(path: Path) -> dict[str, Any]:
    """The config as transformers understands it, so that what an older version wrote compares with what a newer one did."""
    transformers = optional("transformers", "comparing two models", "hf")
    try:
        found = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config is the user's own text, and what a wrong one raises is anybody's guess
        raise DataError(f"'{path}' holds no config that transformers knows: {error}") from error
    entries: Mapping[str, Any] = found.to_dict()
    return dict(entries)


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"'{path}' has no {WEIGHTS}, only '{pickles[0]}', a pickle, which could run code when it is loaded and is never "
            "read here; where you trust it, load it with transformers and save it with save_pretrained"
        )
    return f"'{path}' has neither {WEIGHTS} nor {INDEX}; expected what model.save_pretrained(folder) writes"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
