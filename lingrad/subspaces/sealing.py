"""The entries of a ledger for torch.distributed.checkpoint, which loads the keys that a run has already."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import CheckpointError


def sealed(flat: Mapping[str, Any], coords: Tensor) -> dict[str, Any]:
    """The entries of `Ledger.pack` as the same two, whatever was recorded.

    torch.distributed.checkpoint loads the entries that a run has already, and one that has just begun has none of merges.

    Args:
        flat: The entries.
        coords: Coordinates of the weight.

    Returns:
        ``open`` and ``record``, which has all others.
    """
    rest = BytesIO()
    torch.save({key: value for key, value in flat.items() if key != "open"}, rest)
    return {"open": flat.get("open", torch.zeros_like(coords)), "record": rest.getvalue()}


def opened(flat: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The entries of `Ledger.pack`, sealed or not.

    Args:
        flat: The entries.
        name: The weight's name, for messages.

    Returns:
        The entries.

    Raises:
        CheckpointError: They are damaged.
    """
    if "record" not in flat:
        return flat
    try:
        rest = torch.load(BytesIO(flat["record"]), map_location="cpu", weights_only=True)
        return {**rest, **({"open": flat["open"]} if "open" in flat else {})}
    except Exception as error:  # torch has many for a damaged file
        raise CheckpointError(f"the ledger of {name} is damaged in the checkpoint ({error}); give an earlier one") from error
