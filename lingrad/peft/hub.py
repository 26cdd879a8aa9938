"""Pushing an adapter to a hub: the one place that uses a network, when it is asked to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lingrad.errors import DataError, ExportError, in_short, optional, require, shown
from lingrad.peft.card import on_a_hub
from lingrad.peft.check import open_adapter_file
from lingrad.peft.report import FILE

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def check_repository(repository: object) -> None:
    """Make sure that a name is that of a repository, ``owner/name``; raises `SpecError` where it is not."""
    fits = isinstance(repository, str) and _REPOSITORY.fullmatch(repository) is not None
    require(fits, "push_to_hub", f"push_to_hub must be the name of a repository, 'owner/name', not {shown(repository)}")


def push_to_hub(folder: str | Path, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload an adapter to a repository of the Hugging Face hub, which is made where there is none.

    The report, which names folders of this machine, stays here; its figures are in the card.

    Args:
        folder: The adapter's folder.
        repository: ``owner/name``.
        private: Whether a new repository is private; None for the owner's default.
        token: The token to use; None for that of the login.

    Returns:
        The address of the repository.

    Raises:
        DataError: The folder is no adapter's, or its starting model has no name that others can load it by.
        ExportError: The hub does not take it; the folder stays as it is.
        DependencyError: huggingface_hub is not installed.
    """
    check_repository(repository)
    require_named(str(open_adapter_file(Path(folder)).config.get("base_model_name_or_path") or ""))
    hub: Any = optional("huggingface_hub", "pushing to a hub", "hf")
    try:
        api = hub.HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="Upload adapter", ignore_patterns=[FILE, ".*"]
        )
    except Exception as error:  # of the network, of the hub, of the login
        raise ExportError(f"'{folder}' is written, and was not pushed to '{repository}': {in_short(error)}") from error
    return str(address)


def require_named(start: str) -> None:
    """Make sure that others can load the starting model of an adapter by its name.

    Args:
        start: The name.

    Raises:
        DataError: It is a folder, or empty.
    """
    if not on_a_hub(start):
        named = f"the folder '{start}'" if start else "empty"
        raise DataError(
            f"base_model_name_or_path is {named}, by which others cannot load the starting model of a pushed adapter; export "
            "it with base_model='owner/name'"
        )
