"""APOLLO: gradients scaled by what AdamW does in a random subspace (Zhu et al., MLSys 2025, arXiv 2412.05270, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from lingrad.config.targets import resolve_model
from lingrad.errors import SpecError, require, require_options
from lingrad.methods.base import Method, Training, refuse_packed
from lingrad.optimizers.closure import evaluate
from lingrad.transforms.linalg import gaussian

GROWTH = 1.01  # of a step's norm, at most, from one step to the next (section 4.1)
_OF_BOTH = ("lr", "betas", "eps", "weight_decay")  # options of both optimizers
_OWN = ("every", "scale", "seed")


class ScaledGradients(Optimizer):
    """W <- (1 - lr weight_decay) W - lr scale s G, with s = |A| / |P G| for A, AdamW's step on P G (algorithm 1).

    P [r, short] is Gaussian with variance 1 / r, drawn anew every ``every`` steps and never stored. There is one s for each row
    or column along the longer side, or one for the whole weight. A's moments are corrected for their bias. The norm of s G
    grows by `GROWTH` at most from step to step.

    Args:
        params: Parameters or param groups, of two or more dimensions; all but the first count as one.
        lr: The learning rate.
        rank: r.
        whole: Whether s is one number for a whole weight.
        scale: A factor on the step.
        every: Steps between two draws of P.
        betas: Of the moments.
        eps: Of the moments' quotient.
        weight_decay: Decoupled weight decay.
        seed: Of P.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int,
        whole: bool = False,
        scale: float = 1.0,
        every: int = 200,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        for name, value in (("rank", rank), ("every", every)):
            require(
                type(value) is int and value >= 1, name, f"{name} of APOLLO must be a whole number, 1 or more, not {value!r}"
            )
        require(scale > 0, "scale", f"scale of APOLLO must be above 0, not {scale!r}")
        defaults = {"lr": lr, "rank": rank, "whole": whole, "scale": scale, "every": every, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: Evaluates the model and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = evaluate(closure)
        for group in self.param_groups:
            for number, param in enumerate(group["params"]):
                if param.grad is not None:
                    step = self._scaled(param, group, number) * (group["lr"] * group["scale"])
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.view_as(param))
        return loss

    def _scaled(self, param: Tensor, group: Mapping[str, Any], number: int) -> Tensor:
        """S G."""
        grad, state = param.grad.flatten(1), self.state[param]  # type: ignore[union-attr]
        tall = grad.shape[0] > grad.shape[1]
        matrix = grad.T if tall else grad  # [short, long]
        count = state.get("step", 0)
        seed = group["seed"] + 7919 * number + 104729 * (count // group["every"])
        drawn = gaussian(group["rank"], matrix.shape[0], seed=seed, device=grad.device, dtype=grad.dtype)
        small = drawn @ matrix / group["rank"] ** 0.5
        if not state:
            state |= {"exp_avg": torch.zeros_like(small), "exp_avg_sq": torch.zeros_like(small)}
        first, second = group["betas"]
        mean = state["exp_avg"].lerp_(small, 1 - first) / (1 - first ** (count + 1))
        square = state["exp_avg_sq"].lerp_(small.square(), 1 - second) / (1 - second ** (count + 1))
        stepped = mean / (square.sqrt() + group["eps"])
        sides = None if group["whole"] else 0
        size = torch.linalg.vector_norm(small, dim=sides).clamp_min(1e-30)
        scaled = matrix * (torch.linalg.vector_norm(stepped, dim=sides) / size)
        norm = torch.linalg.vector_norm(scaled)
        if "norm" in state:
            limit = torch.where(state["norm"] > 0, GROWTH * state["norm"], norm)
            scaled = scaled * (limit / norm.clamp_min(1e-30)).clamp_max(1.0)
            norm = torch.minimum(norm, limit)
        state["norm"], state["step"] = norm, count + 1
        found: Tensor = scaled.T if tall else scaled
        return found


@final
@dataclass(frozen=True)
class Apollo(Method):
    """Linear layers by `ScaledGradients`; the rest by AdamW.

    Args:
        rank: Rank of the subspace.
        mini: APOLLO-Mini: one scale for a whole weight, times the root of 128, in place of one for each row or column.
        options: ``lr`` (1e-3), ``betas``, ``eps`` and ``weight_decay`` of both, ``every``, ``scale`` and ``seed`` of
            the former.

    Raises:
        SpecError: There is no option of that name.
    """

    rank: int
    mini: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names of the options."""
        require_options(self.options, (*_OF_BOTH, *_OWN), "APOLLO-Mini" if self.mini else "APOLLO")

    @property
    @override
    def label(self) -> str:
        return f"{'APOLLO-Mini' if self.mini else 'APOLLO'} (rank {self.rank})"

    @override
    def prepare(self, model: nn.Module, *, layerwise: Any = False) -> Training:
        if layerwise is True:
            raise SpecError("APOLLO is not stepped inside the backward here; leave layerwise out", option="layerwise")
        refuse_packed(model, self)
        low = [target.param for target in resolve_model(model, f"svd(rank={self.rank}, clip=true)").targets]
        chosen = {id(param) for param in low}
        rest = [param for param in model.parameters() if param.requires_grad and id(param) not in chosen]
        found = {"lr": 1e-3, "weight_decay": 0.0, **self.options}
        own = {key: found.pop(key) for key in _OWN if key in found}
        own = {"scale": 128.0**0.5 if self.mini else 1.0, **own}
        others: list[Optimizer] = [AdamW(rest, **found)] if rest else []
        return Training(model, [ScaledGradients(low, rank=self.rank, whole=self.mini, **own, **found), *others])
