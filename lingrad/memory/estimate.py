"""The memory of a run in closed form: bytes of every parameter between steps, from shapes and dtypes alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lingrad import optimizers
from lingrad.config.cutting import check_cut, check_target
from lingrad.config.methods import takes_methods
from lingrad.config.residual import parse_residual
from lingrad.config.rules import Rules
from lingrad.config.settings import InBackward, Mode, Settings, Share
from lingrad.config.sharing import GroupedTarget, group_targets
from lingrad.config.targets import Target, resolve_model
from lingrad.console import columns
from lingrad.errors import require, require_one_of
from lingrad.files.atomic import write_whole
from lingrad.memory.kernels import answered
from lingrad.memory.log import CATEGORIES
from lingrad.memory.tracker import Tracker
from lingrad.memory.units import readable
from lingrad.tensors import TensorSpec, distinct, nbytes, storage, wide

SHARED = "(shared by all)"

# two float32 code books of 256 entries for each optimizer of bitsandbytes; a layerwise run has one optimizer per weight
CODE_BOOKS = {"adamw8bit": 2 * 256 * 4}


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of one parameter or buffer, by category.

    Args:
        name: Its name.
        weight: The parameter, if it is trained.
        frozen: The parameter, if it is not trained.
        buffer: The tensor, if it is a buffer.
        gradient: Its gradient, if it is trained in full.
        coords: Its coordinates; in optimizer mode one number, since they are zero between steps, unless they are cut.
        coords_gradient: The gradient of the coordinates [p, q].
        basis: The state of its transform, and what its schedule adds up.
        moments: The state of the base optimizer, and what a ``residual`` keeps.
        activations: What its layer saves for the backward, outside refresh steps, and steps in which ``residual="sampled"``
            draws it: r numbers per token with a right basis. 0 if no number of tokens was given, or if a hook projects the
            gradient.
        host_basis: What of the basis ``offload`` has put in host memory; in no other column.
        host_moments: The same of the moments.
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
    host_basis: int = 0
    host_moments: int = 0


COLUMNS = tuple(name for name in ParameterBytes.__dataclass_fields__ if name != "name")


@dataclass(frozen=True)
class Estimate:
    """The memory of a run between steps, in closed form.

    Args:
        rows: Bytes of each parameter and buffer, and a last row for what parameters share.
        parameters: Elements of all parameters of the model.
        trained: Elements that the base optimizer steps.
    """

    rows: tuple[ParameterBytes, ...]
    parameters: int
    trained: int

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by category; the categories are those of a `MemoryReport`."""
        found: Counter[str] = Counter()
        for row in self.rows:
            for column in COLUMNS:
                found[column.replace("_", " ")] += getattr(row, column)
        return {category: found[category] for category in CATEGORIES if found[category]}

    @property
    def steady(self) -> int:
        """Bytes between steps, gradients included: everything except activations."""
        return sum(n for category, n in self.totals.items() if category != "activations")

    @property
    def host(self) -> dict[str, int]:
        """Bytes in host memory, by category; only of a run with ``offload``."""
        found = {part: sum(getattr(row, f"host_{part}") for row in self.rows) for part in ("basis", "moments")}
        return {category: size for category, size in found.items() if size}

    def __str__(self) -> str:
        totals = self.totals
        rows = [("", "bytes", "")]
        rows += [(category, f"{n:,}", readable(n)) for category, n in totals.items() if category != "activations"]
        rows.append(("between steps", f"{self.steady:,}", readable(self.steady)))
        rows += [(f"in host memory: {category}", f"{n:,}", readable(n)) for category, n in self.host.items()]
        if "activations" in totals:
            rows.append(("saved by transformed layers", f"{totals['activations']:,}", readable(totals["activations"])))
        text = [f"{self.parameters:,} parameters, {self.trained:,} elements are stepped by the base optimizer", ""]
        return "\n".join([*text, *columns(rows, right=[False, True, True])])

    def to_json(self, path: str | Path | None = None) -> str:
        """The estimate as JSON.

        Args:
            path: A file to write it to as well.

        Returns:
            The JSON text.
        """
        plain: dict[str, Any] = {"parameters": self.parameters, "trained": self.trained, "totals": self.totals}
        plain["host"] = self.host
        text = json.dumps(plain | {"rows": [asdict(row) for row in self.rows]}, indent=1)
        if path is not None:
            write_whole(Path(path), text.encode())
        return text


@takes_methods
def estimate(
    model: nn.Module,
    rules: Rules,
    base: optimizers.BaseLike = "adamw",
    mode: Mode = "optimizer",
    *,
    tokens: int = 0,
    layerwise: InBackward = False,
    share: Share | None = None,
    ranks: int = 1,
    **options: Any,
) -> Estimate:
    """Memory between the steps of a `lingrad.wrap` or `lingrad.adapt` run, computed from shapes and dtypes alone.

    Args:
        model: The model; it may be on the meta device, where it takes no memory.
        rules: A config string or rules, as for `lingrad.wrap`.
        base: The base optimizer; its state is counted as on CUDA.
        mode: ``optimizer`` or ``adapter``.
        tokens: Tokens of one forward, for the activations that transformed layers save.
        layerwise: Whether gradients are freed inside the backward.
        share: As for `lingrad.wrap`.
        ranks: Processes over which ``fully_shard`` cuts every parameter by rows; the estimate is that of the first, which holds
            as much as any.
        **options: Options of the base; those of `lingrad.wrap` are accepted, of which ``offload``, ``residual``,
            ``rounding`` and ``train_only`` count.

    Returns:
        The estimate, exact to the byte. Raises the errors of `lingrad.wrap`.
    """
    require_one_of(mode, get_args(Mode), "mode")
    require(type(ranks) is int and ranks >= 1, "ranks", f"ranks must be a whole number, 1 or more, not {ranks!r}")
    settings, base_options = Settings.split({**options, "layerwise": layerwise, "share": share})
    settings.check_mode(mode)
    found = optimizers.find(base, base_options, decay=False, others=Settings.names())
    fallback = found.fallback or found
    if ranks > 1:
        check_cut(found.name, coded=found.quantizer is not None, layerwise=settings.layerwise, offload=settings.offload)
    plan = resolve_model(model, rules, settings.train_only)
    grouped = {id(each.target.param): each for each in group_targets(plan.targets, settings.share)}
    full = {id(param) for _, param in plan.full}
    rows = []
    trained = quantised = 0
    seen: set[int] = set()
    for name, param in model.named_parameters():
        own = grouped.get(id(param))
        if own is not None:
            moments = found.moments(cut(own.coords, ranks), wide(own.target.template.dtype))
            weight = _new(own, seen) if ranks == 1 else _cut_bytes(own.target, ranks)
            rows.append(_transformed(own, moments, mode, weight, tokens=tokens, settings=settings, ranks=ranks))
            trained += prod(own.coords)
        elif id(param) in full:
            shape = cut(tuple(param.shape), ranks)
            size, moments = prod(shape) * param.element_size(), fallback.moments(shape, param.dtype)
            gradient, host = 0 if settings.layerwise is True else size, _offloaded(moments, settings)
            rows.append(ParameterBytes(name, weight=size, gradient=gradient, moments=_sum(moments) - host, host_moments=host))
            trained += param.numel()
        else:
            rows.append(ParameterBytes(name, frozen=prod(cut(tuple(param.shape), ranks)) * param.element_size()))
            continue
        quantised += any(moment.dtype == torch.uint8 for moment in moments)
    buffers = {storage(buffer): (name, buffer) for name, buffer in model.named_buffers()}
    rows += [ParameterBytes(name, buffer=buffer.untyped_storage().nbytes()) for name, buffer in buffers.values()]
    if found.name in CODE_BOOKS and quantised:
        rows.append(ParameterBytes(SHARED, moments=CODE_BOOKS[found.name] * (quantised if settings.layerwise is True else 1)))
    elements = sum(
        prod(grouped[id(param)].target.layout.shape) if id(param) in grouped else param.numel() for param in model.parameters()
    )
    return Estimate(tuple(rows), elements, trained)


def cut(shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The largest part of a tensor that ``fully_shard`` cuts along its first dimension."""
    return (-(-shape[0] // ranks), *shape[1:]) if shape else shape


def _cut_bytes(target: Target, ranks: int) -> int:
    check_target(target)
    return prod(cut(tuple(target.param.shape), ranks)) * target.param.element_size()


def _cut_elements(target: Target, ranks: int) -> int:
    m, n = target.layout.shape
    return prod(cut((m, n), ranks))


def _sum(tensors: list[TensorSpec]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _offloaded(moments: list[TensorSpec], settings: Settings) -> int:
    """Bytes of moments that are in host memory: of all but scalars, such as counts of steps."""
    return _sum([one for one in moments if prod(one.shape) > 1]) if "moments" in settings.offloaded else 0


@lru_cache(maxsize=256)
def _state_bytes(transform: Any, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of a transform's state, without what is computed from it."""
    with Tracker("meta", answered(set())):  # to answer what the transform reads back
        state = transform.init(shape, seed=0, device=torch.device("meta"), dtype=dtype)
    return nbytes(*distinct(leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)))


def _new(grouped: GroupedTarget, seen: set[int]) -> int:
    """Bytes of a weight that are not in `seen` yet: quantised weights may share code books."""
    fresh = {storage(tensor): tensor for tensor in grouped.target.stored if storage(tensor) not in seen}
    seen |= fresh.keys()
    return nbytes(*fresh.values())


def _transformed(
    grouped: GroupedTarget, moments: list[TensorSpec], mode: Mode, weight: int, *, tokens: int, settings: Settings, ranks: int
) -> ParameterBytes:
    target, template = grouped.target, grouped.target.template
    p, q = cut(grouped.coords, ranks)
    dtype = wide(template.dtype)
    size = p * q * dtype.itemsize
    m, n = target.layout.shape
    rule = None if settings.residual is None or (p, q) == (m, n) else parse_residual(settings.residual)
    # a step that reads the gradient itself saves the layer's input as it is
    reads = rule is not None and rule.chance == 1
    width = n if reads else q
    saved = width * tokens * template.element_size() if target.route != "weight" and (grouped.is_first or reads) else 0
    rounds = settings.rounding == "compensated" and (template.dtype != dtype or target.param.dtype == torch.int8)
    error = rounds * _cut_elements(target, ranks) * target.param.element_size()
    decider = target.transform.rule
    followed = [] if decider is None else decider.storage((p, q), template.dtype)
    basis = target.transform.storage(grouped.shape, template.dtype) if grouped.is_first else []
    host, host_basis = _offloaded(moments, settings), 0
    if "bases" in settings.offloaded:
        basis, host_basis = [], _state_bytes(target.transform, grouped.shape, template.dtype) if grouped.is_first else 0
    kept = {"scaled": dtype.itemsize, "feedback": m * n * template.element_size()}.get(rule.kind if rule else "", 0)
    return ParameterBytes(
        target.name,
        weight=weight,
        coords=size if mode == "adapter" or ranks > 1 else dtype.itemsize,
        coords_gradient=0 if settings.layerwise is True else size,
        basis=_sum([*basis, *followed]),
        moments=_sum(moments) - host + kept + error,
        activations=saved,
        host_basis=host_basis,
        host_moments=host,
    )
