"""SCALE: column-normalised SGD with momentum in the last layer alone (Glentis et al., 2025, arXiv 2506.16659)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from lingrad.config.targets import resolve_model
from lingrad.errors import SpecError, require_options
from lingrad.methods.base import Method, Training, refuse_packed
from lingrad.optimizers.closure import evaluate


class ColumnNormalizedSGD(Optimizer):
    """W <- (1 - lr weight_decay) W - lr M / rms(M), with the rms of each column of M [in, out] (algorithm 1).

    M is the gradient, or, with momentum b, its mean M <- b M + (1 - b) G. In a weight [out, in], as torch stores most, a column
    of the paper's is a row, and ``axis`` is 1; in one [in, out], as an embedding or GPT-2's Conv1D, it is 0. As in the authors'
    program a column is divided by its root mean square, not by its norm: the factor between the two, the root of the column's
    length, is a part of the learning rate.

    Args:
        params: Parameters or param groups, of two or more dimensions; all but the first count as one.
        lr: The learning rate.
        momentum: b; 0 keeps no state.
        axis: The dimension, 0 or 1, over which squares are averaged.
        weight_decay: Decoupled weight decay.
        eps: The smallest divisor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        axis: int = 1,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "axis": axis, "weight_decay": weight_decay, "eps": eps})

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
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad
                if group["momentum"]:
                    state = self.state[param]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(param)
                    grad = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
                matrix = grad.flatten(1)
                size = matrix.square().mean(group["axis"], keepdim=True).sqrt_().clamp_min_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_((matrix / size).view_as(param) * group["lr"])
        return loss


@final
@dataclass(frozen=True)
class ColumnNormalized(Method):
    """SCALE: every matrix by `ColumnNormalizedSGD`, with momentum in the output head alone; the rest by AdamW.

    Args:
        options: ``lr`` (1e-3) and ``weight_decay`` (0) of both, and ``momentum`` (0.9) of the head.

    Raises:
        SpecError: There is no option of that name.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names of the options."""
        require_options(self.options, ("lr", "weight_decay", "momentum"), "SCALE")

    @property
    @override
    def label(self) -> str:
        return "SCALE"

    @override
    def prepare(self, model: nn.Module, *, layerwise: Any = False) -> Training:
        if layerwise is True:
            raise SpecError("SCALE is not stepped inside the backward here; leave layerwise out", option="layerwise")
        refuse_packed(model, self)
        plan = resolve_model(model, {"*": "full()"})  # which takes every matrix
        head = getattr(model, "get_output_embeddings", lambda: None)()
        last = plan.targets[-1].param if head is None else head.weight
        found = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, **self.options}
        momentum = found.pop("momentum")
        groups: dict[tuple[float, int], list[nn.Parameter]] = {}
        for target in plan.targets:
            embeds = any(isinstance(owner, nn.Embedding) for owner, _ in target.owners)
            turned = embeds or target.layout.forward == "a0 a1 -> a1 a0"
            own = momentum if target.param is last else 0.0
            groups.setdefault((own, 0 if turned else 1), []).append(target.param)
        made = [{"params": params, "momentum": own, "axis": axis} for (own, axis), params in groups.items()]
        rest = [param for _, param in plan.full]
        others: list[Optimizer] = [AdamW(rest, **found)] if rest else []
        return Training(model, [ColumnNormalizedSGD(made, **found), *others])
