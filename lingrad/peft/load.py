"""A run that starts from an adapter: one factor is the basis, the other the coordinates, trained on in either mode."""

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
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import DualityError, SpecError, require, require_one_of
from lingrad.optimizers.base import BaseLike
from lingrad.peft import names
from lingrad.peft.bare import refuse_peft
from lingrad.peft.read import Adapter, Pair, read_adapter
from lingrad.peft.slots import Basis, Side
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import wide
from lingrad.transforms.base import Transform


@dataclass(frozen=True)
class _Start:
    """Where one weight's run begins.

    Args:
        basis: [m, r] or [n, r]; the adapter's scaling is in it, so that coordinates move as PEFT's factor does.
        coords: [r, n] or [m, r].
        side: On which side the basis is.
    """

    basis: Tensor
    coords: Tensor
    side: Basis


def load(
    path: str | Path,
    model: nn.Module,
    base: BaseLike = "adamw",
    *,
    mode: Mode = "adapter",
    spec: str | Transform | None = None,
    frozen: Side | None = None,
    carry: Carry = "keep",
    ledger: bool = True,
    **options: Any,
) -> SubspaceOptimizer:
    """Go on from a LoRA of PEFT with one of its factors frozen, as the basis, and the other trained, as the coordinates.

    What the adapter saved whole, and its biases, are put into the model and trained in full; everything else is frozen, as PEFT
    freezes it, embeddings too that it only saved.

    Args:
        path: The adapter's folder, with its weights in safetensors.
        model: The plain base model; the adapter goes into it.
        base: The optimizer, as for `lingrad.wrap`.
        mode: ``adapter`` keeps the adapter beside the weights; ``optimizer`` merges it, and merges at every step.
        spec: How the basis is chosen from its first refresh on, such as ``svd(rank=8, every=200)``; the adapter's serves until
            then. Its rank and side must be the adapter's. None keeps the adapter's basis for ever.
        frozen: Which factor is the basis: with ``A``, lora_B is trained, with ``B``, lora_A. Adapters that
            `lingrad.peft.export` wrote say it themselves; it is needed for others.
        carry: As for `lingrad.wrap`.
        ledger: As for `lingrad.wrap`; on, so that the run can be exported as an adapter of the same base.
        **options: As for `lingrad.wrap`: ``lr``, ``betas`` and so on.

    Returns:
        The run, before its first step.

    Raises:
        DataError: The folder is no LoRA's, is damaged, or has its weights in a pickle.
        CheckpointError: It is an adapter of another model.
        DualityError: The adapter has dropout, or no factor that could be a basis.
        SpecError: ``frozen`` is missing, or the spec does not fit the adapter.
        ExportError: The model has PEFT's layers in it already.
        ModeError: The model is wrapped already.
    """
    require_one_of(mode, ("optimizer", "adapter"), "mode")
    require(frozen in (None, "A", "B"), "frozen", f"frozen must be A or B, the factor that is not trained, not {frozen!r}")
    for option in ("share", "stagger"):
        require(
            not options.get(option),
            option,
            f"{option} chooses bases for weights, and the adapter has chosen them; leave it out",
        )
    refuse_peft(model, "starting from an adapter")
    adapter = read_adapter(Path(path), model)
    if adapter.dropout:
        raise DualityError(
            f"the adapter is trained with lora_dropout={adapter.dropout:g}, which acts on the change alone, so that no merged "
            "weight follows it; set it to 0 in adapter_config.json to go on without"
        )
    starts = {name: _start(name, pair, frozen) for name, pair in adapter.low_rank.items()}
    rules: dict[str, Transform] = {}
    for name, start in starts.items():
        rules[name] = _transform(spec, name, start, adapter.low_rank[name].slot.layout.shape)
    with ExitStack() as undo:
        _freeze(model, adapter, undo)
        _fill(model, adapter, undo)
        run = api.adapt(model, rules, base, carry=carry, ledger=ledger, **options)
        undo.callback(run.detach)
        for sub in run.subspaces:
            _require_settable(sub, starts[sub.name])
        undo.pop_all()
    for sub in run.subspaces:
        _begin(sub, starts[sub.name])
    run.switch(mode)
    return run


def _start(name: str, pair: Pair, asked: Side | None) -> _Start:
    side = asked or pair.frozen
    if side is None:
        raise SpecError(
            f"the adapter does not say which factor of '{name}' is to stay: frozen='A' trains lora_B, frozen='B' trains lora_A",
            option="frozen",
        )
    slot = pair.slot
    basis: Basis = slot.basis(side)
    # every expert has factors of its own in an adapter that PEFT made, even where they are equal
    factors = slot.decode(pair.a, pair.b, shared=None if pair.frozen else False)
    if factors.rank != pair.rank and basis == "right":
        raise DualityError(
            f"the experts of '{name}' have frozen factors of their own on the side that lingrad shares among experts; freeze "
            f"the other one: frozen='{slot.side('left')}'"
        )
    left, right = factors.left, factors.right
    if basis == "left":
        return _Start(left * pair.scaling, right, basis)
    return _Start(right.t() * pair.scaling, left, basis)


def _transform(asked: str | Transform | None, name: str, start: _Start, shape: tuple[int, int]) -> Transform:
    rank = start.basis.shape[1]
    if asked is None:
        if rank > min(shape):
            raise SpecError(
                f"the adapter of '{name}' has rank {rank}, more than the {min(shape)} its weight can have; "
                "merge it into the weights (lingrad merge) and start anew"
            )
        return specs.parse(f"svd(rank={rank}, every=0, side={start.side})")  # chosen once, and it is chosen
    found = specs.parse(asked) if isinstance(asked, str) else asked
    has, wants = found.ranks(shape), (rank, None) if start.side == "left" else (None, rank)
    if has != wants:
        raise SpecError(
            f"spec {specs.format(found)} gives '{name}' bases of ranks {has}, left and right, and the adapter {wants}; "
            f"use rank={rank} and side={start.side}, leave spec out, or merge the adapter (lingrad merge) and start anew",
            option="spec",
        )
    return found


def _require_settable(sub: Subspace, start: _Start) -> None:
    if not isinstance(getattr(sub.basis.state, start.side, None), Tensor):
        raise SpecError(
            f"{sub.basis.transform.name} draws its bases and cannot begin with an adapter's; use svd or power, or no spec",
            option="spec",
        )


def _freeze(model: nn.Module, adapter: Adapter, undo: ExitStack) -> None:
    """Let what the adapter holds be trained, and nothing else."""
    params = dict(model.named_parameters(remove_duplicate=False))
    for param in params.values():
        undo.callback(param.requires_grad_, param.requires_grad)
    model.requires_grad_(False)
    for name in (*adapter.low_rank, *(name for name in adapter.full if _trains(adapter, model, name))):
        if name in params and params[name].dtype.is_floating_point:
            params[name].requires_grad_(True)


def _trains(adapter: Adapter, model: nn.Module, name: str) -> bool:
    """Whether what was saved as it is was trained: PEFT saves embeddings too that it leaves alone, if it is told to."""
    owner = name.rpartition(".")[0]
    module = model.get_submodule(owner)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embedding = getattr(model, end, lambda: None)()
        except NotImplementedError:  # of a model of transformers that has none
            continue
        if embedding is module:
            return any(names.saved(owner, entry) for entry in adapter.config.get("modules_to_save") or [])
    return True


@torch.no_grad()
def _fill(model: nn.Module, adapter: Adapter, undo: ExitStack) -> None:
    """Put what the adapter saved as it is into the model."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, value in adapter.full.items():
        undo.callback(own[name].data.copy_, own[name].detach().clone())
        own[name].copy_(value)


@torch.no_grad()
def _begin(sub: Subspace, start: _Start) -> None:
    """Put a subspace where its adapter is, its basis chosen for as long as that serves."""
    held = getattr(sub.basis.state, start.side)
    basis = start.basis.to(held.device)
    rounded = basis.to(held.dtype)
    if not torch.equal(rounded.to(basis.dtype), basis):
        rounded = basis.to(wide(held.dtype))  # a basis of few digits would be another adapter
    sub.coords.copy_(start.coords)
    sub.basis.begin(sub.basis.state._replace(**{start.side: rounded.contiguous()}))
