"""Refreshes on gradients of a real training run: what each costs, and how much of the gradient it captures."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.peers import published_pca
from benchmarks.plan import LLAMA_1024, PERIOD, Capture, Workload
from benchmarks.steps import batches
from lingrad.config import spec
from lingrad.gradients.local import DenseGradient, FactoredGradient
from lingrad.models import build_llama, next_token_loss
from lingrad.subspaces.products import is_projection, products
from lingrad.transforms import Transform, When

TRANSFORMS = (
    "svd(rank={rank})",
    "svd(rank={rank}, solver=gram)",
    "svd(rank={rank}, solver=randomized)",
    "power(rank={rank})",
    "pca(rank={rank})",
    "random(rank={rank})",
    "random(rank={rank}, kind=orthonormal)",
)
EXACT, POWER = TRANSFORMS[0], TRANSFORMS[3]


@dataclass
class Refresh:
    """What was measured of one transform on the gradients of one layer.

    Args:
        layer: The layer.
        shape: (m, n).
        rank: The rank.
        tokens: Of the step the gradients are of.
        transform: Its config string, with ``{rank}``.
        seconds: Of each timed refresh, from the two factors that a backward leaves; without a product that the step makes
            anyway, the coordinates' own gradient.
        energy: After refreshes from all captured gradients, the share of the last one that the basis captures: |P P^T G| / |G|.
        best: The same of the exact SVD of that one.
    """

    layer: str
    shape: tuple[int, int]
    rank: int
    tokens: int
    transform: str
    seconds: list[float] = field(default_factory=list)
    energy: float = 0.0
    best: float = 0.0


Factors = dict[str, list[tuple[Tensor, Tensor]]]


def capture(plan: Capture, device: str) -> Factors:
    """Train by AdamW and keep the factors of some gradients.

    Args:
        plan: The model, the layers, the steps.
        device: Where.

    Returns:
        Layer -> for each kept step dY [T, m] and X [T, n].
    """
    workload = Workload("captured", plan.model, plan.rows)
    measure.say(f"training a Llama of width {plan.model.hidden} for {plan.steps[-1] + 1} steps to capture gradients")
    model = build_llama(plan.model, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    kept: Factors = {name: [] for name, _ in plan.layers}
    inputs: dict[str, Tensor] = {}

    def forward(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        inputs[name] = args[0].detach().flatten(0, 1)

    def backward(name: str, module: nn.Module, grad_in: Any, grad_out: Any) -> None:
        kept[name].append((grad_out[0].flatten(0, 1).clone(), inputs.pop(name).clone()))

    for number, batch in enumerate(batches(workload, plan.steps[-1] + 1, device)):
        handles = []
        for name, _ in plan.layers if number in plan.steps else ():
            layer = model.get_submodule(name)
            handles += [layer.register_forward_hook(partial(forward, name))]
            handles += [layer.register_full_backward_hook(partial(backward, name))]
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * min(1.0, (number + 1) / 20)
        optimizer.zero_grad()
        next_token_loss(model, batch).backward()
        optimizer.step()
        for handle in handles:
            handle.remove()
    del model, optimizer
    gc.collect()
    return kept


def compare(plan: Capture, rounds: int, device: str) -> list[Refresh]:
    """Refresh every transform from the same gradients, one captured step after the other.

    Args:
        plan: The gradients.
        rounds: How often a refresh is timed, at the last of them; the exact SVD as often as the plan says.
        device: Where.

    Returns:
        What was measured.
    """
    kept = capture(plan, device)
    found = []
    for name, rank in plan.layers:
        grads = [FactoredGradient(*factors) for factors in kept[name]]
        found += _compare(name, rank, grads, min(rounds, 3 * plan.exact_runs), plan.exact_runs)
        kept[name].clear()
    return found


def _compare(name: str, rank: int, grads: list[FactoredGradient], rounds: int, exact_runs: int) -> list[Refresh]:
    shape, tokens, place = grads[0].shape, grads[0].out_grad.shape[0], grads[0].device
    measure.say(f"refreshes of {name}, {shape[0]} x {shape[1]}, rank {rank}")
    found = {text: Refresh(name, shape, rank, tokens, text) for text in TRANSFORMS}
    works: dict[str, Callable[[], Any]] = {}
    last = len(grads) - 1
    for text, record in found.items():
        transform = spec.parse(text.format(rank=rank))
        state = transform.init(shape, seed=0, device=place, dtype=torch.float32)
        for number, grad in enumerate(grads[:-1] if text != EXACT else ()):  # the exact SVD remembers nothing of them
            state = transform.refresh(state, grad, When(number * PERIOD, number, 0, shape))
        once = refreshing(transform, state, grads[-1], When(last * PERIOD, last, 0, shape))
        if text == EXACT:
            record.seconds = [measure.timed(once) for _ in range(exact_runs)]
        else:
            works[text] = once
        record.energy = share(transform, once(), grads[-1])
    for text, taken in measure.in_turn(works, rounds).items():
        found[text].seconds = taken
    for record in found.values():
        record.best = found[EXACT].energy
    return list(found.values())


def refreshing(transform: Transform, state: Any, grad: FactoredGradient, when: When) -> Callable[[], Any]:
    """What a refresh adds to a step, as a call that returns the new state."""
    if transform.reads != "sketch":
        return partial(transform.refresh, state, grad, when)
    current = transform.map(state)
    projected = current.project(grad)

    def learn() -> Any:
        probes = transform.probes(state, when)
        known = [is_projection(current, probe) for probe in probes]
        return transform.learn(state, products(grad, probes, known, projected), when)

    return learn


def share(transform: Transform, state: Any, grad: FactoredGradient) -> float:
    """|S S^T G| / |G|: of orthonormal columns the share of the gradient that they capture."""
    current = transform.map(state)
    return float(current.norm(current.project(grad)) / grad.norm())


def pca(rounds: int, device: str) -> dict[str, list[float]]:
    """An online PCA update of a 2736 x 1024 gradient, r = 128: ours from a sketch, the published formula by autograd.

    Args:
        rounds: How often each is timed.
        device: Where.

    Returns:
        Seconds of each round: ``ours`` and ``autograd``, of the matrix that both are given and with Adam's step on the basis;
        ``ours, from factors`` and ``autograd, from factors``, which forms the matrix first.
    """
    measure.say("online PCA updates, 2736 x 1024, rank 128")
    plan = Capture(replace(LLAMA_1024.model, layers=1), 8, (3,), (("model.layers.0.mlp.gate_proj", 128),))
    (factors,) = capture(plan, device)["model.layers.0.mlp.gate_proj"]
    factored = FactoredGradient(*factors)
    grad = DenseGradient(factored.dense().contiguous())
    shape = grad.shape
    transform = spec.parse("pca(rank=128)")
    state = transform.init(shape, seed=0, device=grad.device, dtype=torch.float32)
    for number in range(3):
        state = transform.refresh(state, grad, When(number, number, 0, shape))
    param = nn.Parameter(state.right.clone())
    optimizer = torch.optim.Adam([param], lr=1e-3, fused=True)

    def published(matrix: Tensor) -> None:
        param.grad = published_pca(param, matrix.t(), 0.1)
        optimizer.step()

    when = When(3, 3, 0, shape)
    return measure.in_turn(
        {
            "ours": lambda: transform.refresh(state, grad, when),
            "autograd": lambda: published(grad.matrix),
            "ours, from factors": lambda: transform.refresh(state, factored, when),
            "autograd, from factors": lambda: published(factored.dense()),
        },
        max(rounds, 15),
        warm_up=3,
    )


def plain(found: list[Refresh]) -> list[dict[str, Any]]:
    """The records as plain values."""
    return [asdict(record) for record in found]


def figures(found: list[Refresh]) -> dict[str, float]:
    """The goals' figures: of 2048 x 2048 at rank 256, and the least energy of all layers after three refreshes or more."""
    values: dict[str, float] = {}
    records = {(record.layer, record.shape, record.transform): record for record in found}
    energies = []
    for (layer, shape, text), record in records.items():
        if text != POWER:
            continue
        energies.append(record.energy / record.best)
        exact = records[layer, shape, EXACT]
        if shape == (2048, 2048):
            taken = median(record.seconds) / median(exact.seconds)
            values["power/exact"] = max(taken, values.get("power/exact", 0.0))
    if energies:
        values["power energy"] = min(energies)
    return values
