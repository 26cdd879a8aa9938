"""Objects of a user's own, by the file that holds them: ``FILE.py:NAME``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lingrad.errors import SpecError, did_you_mean, in_short

brought: dict[str, None] = {}  # the files of ``--import``, which the processes of a command's own plan need too


def is_object(text: str) -> bool:
    """Whether a text names an object in a file."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def load_file(file: str, folder: Path) -> Any:
    """Run a file, once in a process, such as one that registers a transform.

    Args:
        file: The file.
        folder: What a relative file is relative to.

    Returns:
        Its module.

    Raises:
        SpecError: There is no such file, or it fails.
    """
    path = (folder / file).resolve()
    if not path.is_file():
        raise SpecError(f"there is no file {path}")
    key = f"lingrad_user_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        if spec is None or spec.loader is None:
            raise SpecError(f"{path} is no file of Python: its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # code of others
            del sys.modules[key]
            raise SpecError(f"{path} fails: {in_short(error)}") from error
    return sys.modules[key]


def bring(files: Sequence[Path], *, to_plan: bool) -> None:
    """Run the files of ``--import``, relative to the working folder.

    Args:
        files: The files.
        to_plan: Whether they are for the runs of a plan.

    Raises:
        SpecError: A file is missing or fails; or it is for the runs of a plan, which name their own.
    """
    if files and to_plan:
        raise SpecError("the runs of a plan have processes of their own: name the file in the plan, imports = ['FILE.py']")
    for file in files:
        load_file(str(file), Path.cwd())
        brought[str(file.absolute())] = None


def load_object(text: str, folder: Path) -> Any:
    """Take an object of a file.

    Args:
        text: ``FILE.py:NAME``.
        folder: What a relative file is relative to.

    Returns:
        The object.

    Raises:
        SpecError: There is no such file or name, or the file fails.
    """
    file, _, name = text.rpartition(":")
    names = vars(load_file(file, folder))
    if name not in names:
        near = did_you_mean(name, [known for known in names if not known.startswith("_")])
        raise SpecError(f"{file} has no '{name}'{near}")
    return names[name]
