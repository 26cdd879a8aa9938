"""Memory in closed form: what every parameter takes between steps, from shapes and dtypes alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from lingrad import optimizers
from lingrad.config.rules import Rules
from lingrad.config.settings import Mode, Settings
from lingrad.config.sharing import Place, Share, places
from lingrad.config.targets import resolve_model
from lingrad.console import align
from lingrad.errors import require_one_of
from lingrad.files.atomic import write_whole
from lingrad.memory.log import CATEGORIES
from lingrad.memory.units import readable
from lingrad.tensors import TensorSpec, wide
from lingrad.weights.bitsandbytes import packed_of

SHARED = "(shared by all)"

# of bitsandbytes: two code books of 256 float32 numbers, for each stock optimizer, of which layerwise runs have many
CODE_BOOKS = {"adamw8bit": 2 * 256 * 4}


@dataclass(frozen=True)
class Row:
    """What one parameter takes, in bytes.

    Args:
        name: Its name.
        weight: The parameter, where it is trained.
        frozen: The parameter, where it is not.
        buffer: The tensor, where it is a buffer.
        gradient: Its gradient, where it is trained in full.
        coords: Its coordinates; a single zero in optimizer mode, where they are zero between steps.
        coords_gradient: The gradient of the coordinates, p x q numbers.
        basis: What its transform keeps.
        moments: What the base optimizer keeps.
        activations: What its layer saves for the backward of its coordinates, off refresh steps: r numbers a token with a
            right basis; 0 where no count of tokens was given, or the gradient is projected by a hook.
    """

    name: str
    weight: int = 0
    frozen: int = 0
    buffer: int = 0
    gradient: int = 0
    coords: int = 0
    coords_gradient: int = 0
    basis: int = 0
    moments: int = 0
    activations: int = 0


COLUMNS = tuple(name for name in Row.__dataclass_fields__ if name != "name")


@dataclass(frozen=True)
class Ledger:
    """The rows of all parameters.

    Args:
        rows: One for each parameter and buffer, and one for what parameters share.
        parameters: Numbers in the model.
        trained: Numbers that the base optimizer steps.
    """

    rows: tuple[Row, ...]
    parameters: int
    trained: int

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by category, named as in a `MemoryReport`."""
        found: Counter[str] = Counter()
        for row in self.rows:
            for column in COLUMNS:
                found[column.replace("_", " ")] += getattr(row, column)
        return {category: found[category] for category in CATEGORIES if found[category]}

    @property
    def steady(self) -> int:
        """Bytes between steps, gradients included: all but activations."""
        return sum(n for category, n in self.totals.items() if category != "activations")

    def __str__(self) -> str:
        totals = self.totals
        rows = [("", "bytes", "")]
        rows += [(category, f"{n:,}", readable(n)) for category, n in totals.items() if category != "activations"]
        rows.append(("between steps", f"{self.steady:,}", readable(self.steady)))
        if "activations" in totals:
            rows.append(("saved by transformed layers", f"{totals['activations']:,}", readable(totals["activations"])))
        header, *lines = align(rows, right=[False, True, True])
        text = [f"{self.parameters:,} parameters, {self.trained:,} numbers are stepped by the base optimizer", ""]
        return "\n".join([*text, *("  ".join(line).rstrip() for line in (header, *lines))])

    def to_json(self, path: str | Path | None = None) -> str:
        """The ledger as JSON.

        Args:
            path: Where to write it too, if anywhere.

        Returns:
            The text.
        """
        plain: dict[str, Any] = {"parameters": self.parameters, "trained": self.trained, "totals": self.totals}
        text = json.dumps(plain | {"rows": [asdict(row) for row in self.rows]}, indent=1)
        if path is not None:
            write_whole(Path(path), text.encode())
        return text


def ledger(
    model: nn.Module,
    rules: Rules,
    base: optimizers.BaseLike = "adamw",
    mode: Mode = "optimizer",
    *,
    tokens: int = 0,
    layerwise: bool = False,
    share: Share | None = None,
    **options: Any,
) -> Ledger:
    """What `lingrad.wrap` or `lingrad.adapt` would take between steps, by shapes alone.

    Args:
        model: The model; the meta device will do, and takes no memory.
        rules: The spec or rules.
        base: The base optimizer; moments are counted as on CUDA.
        mode: ``optimizer`` or ``adapter``.
        tokens: Tokens of a forward, for what transformed layers save of them.
        layerwise: Whether gradients are freed inside the backward.
        share: As for `lingrad.wrap`.
        **options: Options of the base, and of `lingrad.wrap`, which change nothing here.

    Returns:
        The ledger, exact to the byte; errors are those of `lingrad.wrap`.
    """
    require_one_of(mode, get_args(Mode), "mode")
    _, base_options = Settings.split(options)
    found = optimizers.find(base, base_options, decay=False, others=Settings.names())
    rest = found.fallback or found
    plan = resolve_model(model, rules)
    placed = {id(place.target.param): place for place in places(plan.targets, share)}
    full = {id(param) for _, param in plan.full}
    rows = []
    trained = quantised = 0
    seen: set[int] = set()
    for name, param in model.named_parameters():
        nbytes = param.numel() * param.element_size()
        place = placed.get(id(param))
        if place is not None:
            moments = found.moments(place.coords, wide(place.target.like.dtype))
            rows.append(_transformed(place, moments, mode, _new(place, seen), tokens=tokens, layerwise=layerwise))
            trained += prod(place.coords)
        elif id(param) in full:
            moments = rest.moments(tuple(param.shape), param.dtype)
            rows.append(Row(name, weight=nbytes, gradient=0 if layerwise else nbytes, moments=_sum(moments)))
            trained += param.numel()
        else:
            rows.append(Row(name, frozen=nbytes))
            continue
        quantised += any(moment.dtype == torch.uint8 for moment in moments)
    buffers = {buffer.untyped_storage()._cdata: (name, buffer) for name, buffer in model.named_buffers()}
    rows += [Row(name, buffer=buffer.untyped_storage().nbytes()) for name, buffer in buffers.values()]
    if found.name in CODE_BOOKS and quantised:
        rows.append(Row(SHARED, moments=CODE_BOOKS[found.name] * (quantised if layerwise else 1)))
    numbers = sum(
        prod(placed[id(param)].target.layout.shape) if id(param) in placed else param.numel() for param in model.parameters()
    )
    return Ledger(tuple(rows), numbers, trained)


def _sum(kept: list[TensorSpec]) -> int:
    return sum(stored.nbytes for stored in kept)


def _new(place: Place, seen: set[int]) -> int:
    """Bytes of a weight, whose code books other quantised weights may hold too."""
    target = place.target
    held = packed_of(target.owners[0][0], target.name).tensors() if target.route == "packed" else [target.param]
    fresh = {t.untyped_storage()._cdata: t for t in held if t.untyped_storage()._cdata not in seen}
    seen |= fresh.keys()
    return sum(tensor.numel() * tensor.element_size() for tensor in fresh.values())


def _transformed(place: Place, moments: list[TensorSpec], mode: Mode, weight: int, *, tokens: int, layerwise: bool) -> Row:
    target, like = place.target, place.target.like
    p, q = place.coords
    dtype = wide(like.dtype)
    numbers = p * q * dtype.itemsize
    saved = q * tokens * like.element_size() if target.route != "weight" and place.leads else 0
    return Row(
        target.name,
        weight=weight,
        coords=numbers if mode == "adapter" else dtype.itemsize,
        coords_gradient=0 if layerwise else numbers,
        basis=_sum(target.transform.storage(place.shape, like.dtype)) if place.leads else 0,
        moments=_sum(moments),
        activations=saved,
    )
