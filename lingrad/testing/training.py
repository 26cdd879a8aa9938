"""Small training runs, and the distance between their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lingrad import api, optimizers
from lingrad.config.rules import Rules
from lingrad.engine.optimizer import SubspaceOptimizer

Batches = Sequence[Sequence[Tensor]]  # steps of micro-batches

BatchLoss = Callable[[nn.Module, Tensor], Tensor]

TOKENS = 20


def weight_gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, float]:
    """The distance between two sets of weights.

    Args:
        a: Weights by name.
        b: Weights by the same names.

    Returns:
        The largest absolute difference of any entry, and the largest |A - B|_F / |B|_F of any weight.
    """
    with torch.no_grad():
        differences = {name: a[name] - b[name] for name in b}
        absolute = max(float(d.abs().max()) for d in differences.values())
        return absolute, max(float(d.norm() / b[name].norm()) for name, d in differences.items())


def trajectories(
    build: Callable[[], nn.Module],
    rules: Rules,
    base: optimizers.BaseLike,
    batches: Batches,
    loss: BatchLoss,
    *,
    switches: Sequence[int] | None = None,
    clip: float | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """The weights after a run in optimizer mode, one in adapter mode, and one that changes its mode.

    Args:
        build: Makes the model, with the same weights at every call.
        rules: As for `lingrad.wrap`.
        base: As for `lingrad.wrap`.
        batches: For each step its micro-batches.
        loss: (model, micro-batch) -> loss.
        switches: Steps before which the third run changes its mode; default a third and two thirds of the run.
        clip: Clip by ``opt.clip_grad_norm_`` at this norm.
        **options: For `lingrad.wrap`.

    Returns:
        Name -> weight, for each of the three.
    """
    if switches is None:
        switches = (len(batches) // 3, 2 * len(batches) // 3)
    weights = []
    for mode, when in (("optimizer", ()), ("adapter", ()), ("optimizer", switches)):
        model = build()
        make = api.adapt if mode == "adapter" else api.wrap
        optimizer = make(model, rules, base, **options)
        train(model, optimizer, batches, loss, switches=when, clip=clip)
        optimizer.detach()
        weights.append({name: param.detach().clone() for name, param in model.named_parameters()})
    return weights


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss: BatchLoss,
    *,
    switches: Sequence[int] = (),
    clip: float | None = None,
    schedule: bool = True,
) -> float:
    """Train with micro-batches and a cosine schedule.

    Args:
        model: The model.
        optimizer: Its optimizer; switches and a clip are for lingrad's only.
        batches: For each step its micro-batches.
        loss: (model, micro-batch) -> loss.
        switches: Steps before which the mode changes.
        clip: Clip by ``opt.clip_grad_norm_`` at this norm.
        schedule: Whether the learning rate falls along a cosine.

    Returns:
        The last micro-batch's loss, divided by the number of micro-batches.
    """
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches)) if schedule else None
    last = torch.zeros(())
    for step, micro_batches in enumerate(batches):
        if step in switches and isinstance(optimizer, SubspaceOptimizer):
            optimizer.switch("adapter" if optimizer.mode == "optimizer" else "optimizer")
        optimizer.zero_grad()
        for batch in micro_batches:
            last = loss(model, batch) / len(micro_batches)
            last.backward()
        if clip is not None and isinstance(optimizer, SubspaceOptimizer):
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return float(last.detach())


class EveryKind(nn.Module):
    """One layer of every kind of weight: embedding, convolution, fused experts, Linear with and without bias, one more.

    Args:
        middle: A layer [..., 10] -> [..., 14]; default a subclass of Linear, whose gradient a hook projects.
    """

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 12)
        self.conv = nn.Conv2d(1, 6, (3, 3), padding=1)
        self.experts = _Experts()
        self.middle = _OwnLinear(10, 14, bias=False) if middle is None else middle
        self.biased = nn.Linear(14, 11)
        self.head = nn.Linear(11, TOKENS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids, int64 [rows, length] -> scores of the first token, [rows, TOKENS]."""
        x: Tensor = self.embed(ids)  # [rows, length, 12]
        x = self.conv(x[:, None]).tanh().mean(1).mean(1)  # [rows, 12]
        x = nn.functional.relu(self.biased(self.middle(self.experts(x))), inplace=True)
        scores: Tensor = self.head(x)
        return scores


class _Experts(nn.Module):
    """Fused experts, one 3-D weight [experts, in, out]; every token goes to all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 10) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.gate_up_proj).tanh()


class _OwnLinear(nn.Linear):
    """A subclass of Linear, which does not get a projected backward."""


def every_kind(dtype: torch.dtype = torch.float64, middle: Callable[[], nn.Module] | None = None) -> EveryKind:
    """An `EveryKind` with the same weights at every call; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EveryKind(None if middle is None else middle()).to(dtype)


def token_batches(
    steps: int, *, micro: int = 2, rows: int = 4, length: int = 5, seed: int = 1, tokens: int = TOKENS
) -> Batches:
    """Random token ids, int64 [rows, length]: for each step ``micro`` micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randint(0, tokens, (rows, length), generator=generator, device="cpu") for _ in range(micro)]
        for _ in range(steps)
    ]


def token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of `EveryKind`: cross-entropy of the first token, 0-d."""
    return nn.functional.cross_entropy(model(ids), ids[:, 0])
