"""What lingrad is compared with: other packages set up as they say themselves, and two limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lingrad import optimizers
from lingrad.config.targets import resolve_model
from lingrad.errors import optional
from lingrad.methods import FullRank, Method, Training

LR = 1e-4


def split(model: nn.Module, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that a low-rank method projects, and the others: every Linear but the output head, as for lingrad.

    Args:
        model: The model.
        rank: The rank.

    Returns:
        Projected ones, other ones.
    """
    plan = resolve_model(model, f"svd(rank={rank}, clip=true)")
    return [target.param for target in plan.targets], [param for _, param in plan.full]


@final
@dataclass(frozen=True)
class Frozen(Method):
    """The limit: the linear layers do not train at all; embeddings, norms and the head do, by fused AdamW."""

    @property
    @override
    def label(self) -> str:
        return "linears frozen (the limit)"

    @override
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        linears, rest = split(model, 1)
        for param in linears:
            param.requires_grad_(False)
        return Training(model, [optimizers.find("adamw", {"lr": LR}).build(rest)])


@final
@dataclass(frozen=True)
class LinearsOnly(Method):
    """A method of lingrad with everything but the transformed layers frozen, as PEFT freezes it.

    Args:
        method: The method.
        rank: Its rank.
    """

    method: Method
    rank: int

    @property
    @override
    def label(self) -> str:
        return f"{self.method.label}, the rest frozen"

    @override
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        for param in split(model, self.rank)[1]:
            param.requires_grad_(False)
        return self.method.prepare(model)


@final
@dataclass(frozen=True)
class Peer(Method):
    """An optimizer of another package that takes its low-rank options in the group of the projected weights.

    Args:
        package: The package, of the extra ``bench``.
        optimizer: The name of its class.
        rank: Rank of the projection.
        every: Steps between refreshes.
        options: Further options of that group.
    """

    package: str
    optimizer: str
    rank: int
    every: int
    options: dict[str, Any]

    @property
    @override
    def label(self) -> str:
        return f"{self.package} {self.optimizer} (rank {self.rank})"

    @override
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        factory = getattr(optional(self.package, f"comparing with {self.package}", "bench"), self.optimizer)
        linears, rest = split(model, self.rank)
        low = {"rank": self.rank, "update_proj_gap": self.every, **self.options}
        return Training(model, [factory([{"params": rest}, {"params": linears, **low}], lr=LR)])


def paged_8bit() -> FullRank:
    """Full AdamW of bitsandbytes with 8-bit moments in memory that pages to the host, as torchtune sets it up."""
    return FullRank(optional("bitsandbytes", "comparing with bitsandbytes", "bnb").optim.PagedAdamW8bit)


def pytorch_optimizer(rank: int, every: int) -> Peer:
    """GaLore of pytorch_optimizer."""
    return Peer("pytorch_optimizer", "GaLore", rank, every, {"scale": 0.25, "projection_type": "std"})


def apollo_torch(rank: int, every: int) -> Peer:
    """APOLLO of apollo_torch, random projection and channel scaling, as its page sets it up."""
    chosen = {"scale": 1, "proj_type": "std", "proj": "random", "scale_type": "channel"}
    return Peer("apollo_torch", "APOLLOAdamW", rank, every, chosen)


def published_pca(basis: Tensor, grad: Tensor, lam: float) -> Tensor:
    """The gradient of |P P^T N - N|^2 + lam |P^T P - I|^2, N = G / |G|, by autograd (arXiv 2408.12857, section 3.2).

    Args:
        basis: P [m, r].
        grad: G [m, n].
        lam: Weight of the orthonormality term.

    Returns:
        [m, r].
    """
    with torch.enable_grad():
        param = basis.detach().requires_grad_()
        unit = grad / grad.norm()
        loss = (param @ (param.t() @ unit) - unit).square().sum()
        identity = torch.eye(param.shape[1], device=param.device, dtype=param.dtype)
        loss = loss + lam * (param.t() @ param - identity).square().sum()
        (slope,) = torch.autograd.grad(loss, param)
    return slope


class _OnlineSubspaceDescent(Optimizer):
    """AdamW in P^T G, lifted, then one Adam step on P: the loop of the paper, on full gradients."""

    def __init__(self, params: Iterable[Tensor], rank: int, lam: float = 0.1, lr: float = LR) -> None:
        super().__init__(params, {"rank": rank, "lam": lam, "lr": lr})
        self.moments: dict[int, Optimizer] = {}
        self.learners: dict[int, Optimizer] = {}
        self.coords: dict[int, nn.Parameter] = {}
        self.bases: dict[int, nn.Parameter] = {}

    @torch.no_grad()
    @override
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self._update(param, group)

    def tensors(self) -> list[Tensor]:
        """What stays between steps."""
        inner = [*self.moments.values(), *self.learners.values()]
        moments = [value for optimizer in inner for state in optimizer.state.values() for value in state.values()]
        return [*moments, *self.bases.values(), *self.coords.values()]

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        tall = param.shape[0] >= param.shape[1]
        grad, weight, key = (param.grad.t(), param.t(), id(param)) if tall else (param.grad, param, id(param))
        if key not in self.bases:
            start = torch.linalg.svd(grad, full_matrices=False)[0][:, : group["rank"]].contiguous()
            self.bases[key], self.coords[key] = nn.Parameter(start), nn.Parameter(start.t() @ grad)
            self.moments[key] = torch.optim.AdamW([self.coords[key]], lr=group["lr"], weight_decay=0.0, fused=True)
            self.learners[key] = torch.optim.Adam([self.bases[key]], lr=1e-3, fused=True)
        basis, coords = self.bases[key], self.coords[key]
        coords.zero_()
        coords.grad = basis.t() @ grad
        self.moments[key].step()
        weight.add_(basis @ coords)
        basis.grad = published_pca(basis, grad, group["lam"])
        self.learners[key].step()


@final
@dataclass(frozen=True)
class PublishedOSD(Method):
    """Online Subspace Descent's published update, written as its autograd formula.

    Args:
        rank: Rank of the basis.
    """

    rank: int

    @property
    @override
    def label(self) -> str:
        return f"Online Subspace Descent, autograd (rank {self.rank})"

    @override
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        linears, rest = split(model, self.rank)
        build: Callable[..., Optimizer] = optimizers.find("adamw", {"lr": LR}).build
        return Training(model, [_OnlineSubspaceDescent(linears, self.rank), build(rest)])
