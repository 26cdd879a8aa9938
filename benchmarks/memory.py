"""Memory: what a step takes beyond weights and activations, and what transformed layers save for their backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.plan import ENTRIES, EXACT, FULL, GALORE, LORA_ONE, OPTIMIZER, SHARED, Workload
from lingrad.memory import simulate
from lingrad.models import build_llama, next_token_loss
from lingrad.tensors import storage

KEYS = (FULL, OPTIMIZER, SHARED, EXACT, "adapter, all trained", LORA_ONE, GALORE)
MODEL = ("weight", "frozen", "buffer", "activations", "input")


def compare(workload: Workload) -> dict[str, dict[str, Any]]:
    """Simulate two steps of each method, checkpointing on, and tell the most of what is not weights or activations.

    The simulation runs the real step on tensors without numbers; that it takes the bytes of a real run is what
    tests/memory/test_runs.py shows.

    Args:
        workload: The model and the batch.

    Returns:
        Key -> ``refresh`` and ``ordinary``: the peak of the first and of the second step in bytes, and what it consists of
        beyond weights and activations; ``beyond``: its sum in the ordinary step.
    """
    found = {}
    for key in KEYS:
        measure.say(f"{workload.name}: memory of {key}")
        report = simulate(
            lambda: build_llama(workload.model, seed=0),
            ENTRIES[key].make(workload.rank, 200),
            batch=workload.rows,
            length=workload.model.length,
            dtype=workload.dtype,
            checkpointing=True,
            device="cpu",
        )
        refresh, ordinary = report.by_step
        found[key] = {"refresh": refresh, "ordinary": ordinary, "beyond": beyond(ordinary), "at refresh": beyond(refresh)}
    return found


def beyond(breakdown: dict[str, int]) -> int:
    """Bytes that are neither the model nor its activations."""
    return sum(nbytes for category, nbytes in breakdown.items() if category not in MODEL)


def saved(workload: Workload) -> dict[str, float]:
    """What layers with a right map save of a forward for the backward, beside what the plain layers save; weights left out.

    Args:
        workload: The model; one layer of it and one row are enough.

    Returns:
        Numbers saved a token over q, k, v, o, gate and up, a storage that several of them save counted once: ``plain``,
        ``ours`` and ``ours, shared`` (share="input"). ``share``: the most that any one layer saves, over what the plain layer
        does, in units of r / n.
    """
    small = replace(workload.model, layers=1)
    ids = torch.zeros(1, small.length, dtype=torch.int64)
    kept: dict[str, dict[str, dict[int, int]]] = {}
    for name, key in (("plain", None), ("ours", OPTIMIZER), ("ours, shared", SHARED)):
        model = build_llama(small, seed=0)
        layers = {name: layer for name, layer in model.named_modules() if name.endswith("_proj") and "down" not in name}
        if key is not None:
            training = ENTRIES[key].make(workload.rank, 200).prepare(model)
            next_token_loss(model, ids).backward()  # the step that refreshes keeps whole inputs
            training.step()
            training.zero_grad()
        kept[name] = _saved_by(model, layers, ids)
    tokens = ids.numel()
    found = {}
    for name, layers_of in kept.items():
        distinct = {key: size for storages in layers_of.values() for key, size in storages.items()}
        found[name] = sum(distinct.values()) / tokens
    single = {name: {layer: sum(s.values()) for layer, s in layers_of.items()} for name, layers_of in kept.items()}
    worst = max(single["ours"][layer] / plain for layer, plain in single["plain"].items())
    return found | {"share": worst * small.hidden / workload.rank}


def _saved_by(model: nn.Module, layers: dict[str, nn.Module], ids: Tensor) -> dict[str, dict[int, int]]:
    """Layer -> the storages it saves, with the numbers in them; parameters left out."""
    found: dict[str, dict[int, int]] = {name: {} for name in layers}
    alive: list[Tensor] = []  # so that no two storages get the same key
    parameters = set(map(storage, model.parameters()))
    inside: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        key = storage(tensor)
        if inside and key not in parameters:
            found[inside[-1]][key] = tensor.numel()
            alive.append(tensor)
        return tensor

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: inside.append(name), prepend=True))
        handles.append(layer.register_forward_hook(lambda *_: inside.clear()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, ids)
    for handle in handles:
        handle.remove()
    return found
