"""A run that starts from an adapter: one factor is the basis, the other the coordinates, trained in either mode."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad import api
from lingrad.config import spec as specs
from lingrad.config.settings import Carry, Mode
from lingrad.deprecated import renamed_keywords
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import DualityError, SpecError, require, require_one_of
from lingrad.optimizers.base import BaseLike
from lingrad.peft import names
from lingrad.peft.bare import refuse_peft
from lingrad.peft.read import Adapter, LoraPair, read_adapter
from lingrad.peft.slots import FactorSide, LoraFactor
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import wide
from lingrad.transforms.base import Transform


@dataclass(frozen=True)
class _Start:
    """The start of one weight.

    Args:
        basis: [m, r] or [n, r]; includes the adapter's scaling, so that coordinates are updated as PEFT's factor is.
        coords: [r, n] or [m, r].
        side: On which side the basis is.
    """

    basis: Tensor
    coords: Tensor
    side: FactorSide


@renamed_keywords("lingrad.peft.load", spec="rules")
def load(
    path: str | Path,
    model: nn.Module,
    base: BaseLike = "adamw",
    *,
    mode: Mode = "adapter",
    rules: str | Transform | None = None,
    frozen: LoraFactor | None = None,
    carry: Carry = "keep",
    ledger: bool = True,
    **options: Any,
) -> SubspaceOptimizer:
    """Train a LoRA of PEFT further with one of its factors frozen, as the basis, and the other trained, as the coordinates.

    The modules that the adapter saves in full, and its biases, are copied into the model and trained in full. Everything else
    is frozen, as in PEFT, also embeddings that it saved without training them.

    Args:
        path: The adapter's folder, with its weights in safetensors.
        model: The plain model that the adapter is for; the adapter is loaded into it.
        base: The base optimizer, as for `lingrad.wrap`.
        mode: ``adapter`` keeps the adapter apart from the weights; ``optimizer`` merges it, and merges at every step.
        rules: A config string, such as ``svd(rank=8, every=200)``, for every basis from its first refresh on; the adapter's is
            used until then. Its rank and side must be the adapter's. None keeps the adapter's basis throughout.
        frozen: Which factor is the basis: with ``A``, lora_B is trained, with ``B``, lora_A. Adapters written by
            `lingrad.peft.export` record it; it is needed for others.
        carry: As for `lingrad.wrap`.
        ledger: As for `lingrad.wrap`; on by default, so that the run can be exported as an adapter for the same model.
        **options: As for `lingrad.wrap`: ``lr``, ``betas`` and so on.

    Returns:
        The run, before its first step.

    Raises:
        DataError: The folder is no LoRA's, is damaged, or has its weights in a pickle.
        CheckpointError: It is an adapter of another model.
        DualityError: The adapter has dropout, or no factor that can be a basis.
        SpecError: ``frozen`` is missing, or the config string does not fit the adapter.
        ExportError: The model already has PEFT's layers in it.
        ModeError: The model is already wrapped.
    """
    require_one_of(mode, ("optimizer", "adapter"), "mode")
    require(frozen in (None, "A", "B"), "frozen", f"frozen must be A or B, the factor that is not trained, not {frozen!r}")
    for option in ("share", "stagger"):
        require(
            not options.get(option),
            option,
            f"{option} chooses bases for weights, and here they are the adapter's; leave it out",
        )
    refuse_peft(model, "starting from an adapter")
    adapter = read_adapter(path, model)
    if adapter.dropout:
        raise DualityError(
            f"the adapter is trained with lora_dropout={adapter.dropout:g}, which acts on the change alone, so no merged "
            "weight can follow it; set it to 0 in adapter_config.json to train without dropout"
        )
    starts = {name: _start(name, pair, frozen) for name, pair in adapter.low_rank.items()}
    chosen: dict[str, Transform] = {}
    for name, start in starts.items():
        chosen[name] = _transform(rules, name, start, adapter.low_rank[name].slot.layout.shape)
    with ExitStack() as undo:
        _freeze(model, adapter, undo)
        _fill(model, adapter, undo)
        run = api.adapt(model, chosen, base, carry=carry, ledger=ledger, **options)
        undo.callback(run.detach)
        for sub in run.subspaces:
            _require_settable(sub, starts[sub.name])
        undo.pop_all()
    for sub in run.subspaces:
        _begin(sub, starts[sub.name])
    run.switch(mode)
    return run


def _start(name: str, pair: LoraPair, asked: LoraFactor | None) -> _Start:
    factor = asked or pair.frozen
    if factor is None:
        raise SpecError(
            f"the adapter does not say which factor of '{name}' is frozen: frozen='A' trains lora_B, frozen='B' trains lora_A",
            option="frozen",
        )
    slot = pair.slot
    side = slot.side_of(factor)
    # in an adapter made by PEFT every expert has its own factors, even where they are equal
    factors = slot.decode(pair.a, pair.b, shared=None if pair.frozen else False)
    if factors.rank != pair.rank and side == "right":
        raise DualityError(
            f"each expert of '{name}' has its own frozen factor on the side that lingrad shares among experts; freeze the "
            f"other one: frozen='{slot.factor_on('left')}'"
        )
    left, right = factors.left, factors.right
    if side == "left":
        return _Start(left * pair.scaling, right, side)
    return _Start(right.t() * pair.scaling, left, side)


def _transform(asked: str | Transform | None, name: str, start: _Start, shape: tuple[int, int]) -> Transform:
    rank = start.basis.shape[1]
    if asked is None:
        if rank > min(shape):
            raise SpecError(
                f"the adapter of '{name}' has rank {rank}, more than the {min(shape)} its weight can have; "
                "merge it into the weights (lingrad merge) and start a new run"
            )
        return specs.parse(f"svd(rank={rank}, every=0, side={start.side})")  # the basis is chosen once: now
    found = specs.parse(asked) if isinstance(asked, str) else asked
    has, wants = found.ranks(shape), (rank, None) if start.side == "left" else (None, rank)
    if has != wants:
        raise SpecError(
            f"spec {specs.format(found)} gives '{name}' bases of ranks {has}, left and right, and the adapter {wants}; "
            f"use rank={rank} and side={start.side}, leave spec out, or merge the adapter (lingrad merge) and start a new run",
            option="spec",
        )
    return found


def _require_settable(sub: Subspace, start: _Start) -> None:
    basis = getattr(sub.basis.state, start.side, None)
    if not isinstance(basis, Tensor) or not basis.is_floating_point():
        raise SpecError(
            f"{sub.basis.transform.name} computes its bases and cannot begin with an adapter's; use svd or power, or no spec",
            option="spec",
        )


def _freeze(model: nn.Module, adapter: Adapter, undo: ExitStack) -> None:
    """Make what the adapter trains trainable, and freeze everything else."""
    params = dict(model.named_parameters(remove_duplicate=False))
    for param in params.values():
        undo.callback(param.requires_grad_, param.requires_grad)
    model.requires_grad_(False)
    for name in (*adapter.low_rank, *(name for name in adapter.full if _trains(adapter, model, name))):
        if name in params and params[name].dtype.is_floating_point:
            params[name].requires_grad_(True)


def _trains(adapter: Adapter, model: nn.Module, name: str) -> bool:
    """Whether what was saved in full was trained: PEFT can also save embeddings that it does not train."""
    owner = name.rpartition(".")[0]
    module = model.get_submodule(owner)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embedding = getattr(model, end, lambda: None)()
        except NotImplementedError:  # a model of transformers that has none
            continue
        if embedding is module:
            return any(names.saved(owner, entry) for entry in adapter.config.get("modules_to_save") or [])
    return True


@torch.no_grad()
def _fill(model: nn.Module, adapter: Adapter, undo: ExitStack) -> None:
    """Copy what the adapter saved in full into the model."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, value in adapter.full.items():
        undo.callback(own[name].data.copy_, own[name].detach().clone())
        own[name].copy_(value)


@torch.no_grad()
def _begin(sub: Subspace, start: _Start) -> None:
    """Set the basis and coordinates of a subspace to those of its adapter."""
    current = getattr(sub.basis.state, start.side)
    basis = start.basis.to(current.device)
    rounded = basis.to(current.dtype)
    if not torch.equal(rounded.to(basis.dtype), basis):
        rounded = basis.to(wide(current.dtype))  # rounding the basis would change the adapter
    sub.coords.copy_(start.coords)
    sub.basis.begin(sub.basis.state._replace(**{start.side: rounded.contiguous()}))
