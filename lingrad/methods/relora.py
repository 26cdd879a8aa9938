"""ReLoRA: PEFT's LoRA that is merged and started again (Lialin et al., ICLR 2024, arXiv 2307.05695)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lingrad import optimizers
from lingrad.errors import SpecError, require
from lingrad.methods.base import Method, Training, lora_model, refuse_packed


@final
@dataclass(frozen=True)
class ReLora(Method):
    """LoRA on every Linear except the output head, merged every so many steps; all other parameters train in full.

    After such a step W <- W + B A, A is drawn again as at the start, B is zero, and of the moments of both only the largest
    entries stay (algorithm 1). The paper starts from some steps of full training, and warms the learning rate up again after
    each restart, for 50 to 100 steps: both are the caller's, the latter by a scheduler.

    Args:
        rank: The rank.
        every: Steps between restarts.
        prune: The share of each moment's entries that become zero, those of the smallest magnitude; 1 drops all. The paper has
            0.9 to 0.99. The count of steps, of the bias correction, goes on.
        options: Options of AdamW.

    Raises:
        SpecError: An option is out of range.
    """

    rank: int
    every: int = 5000
    prune: float = 0.99
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the options."""
        require(
            type(self.every) is int and self.every >= 1, "every", f"every must be a whole number, 1 or more, not {self.every!r}"
        )
        require(0.0 <= self.prune <= 1.0, "prune", f"prune is a share of the moments, from 0 to 1, not {self.prune!r}")

    @property
    @override
    def label(self) -> str:
        return f"ReLoRA (rank {self.rank}, every {self.every})"

    @override
    def prepare(self, model: nn.Module, *, layerwise: Any = False) -> Training:
        if layerwise is True:
            raise SpecError("ReLoRA is not stepped inside the backward here; leave layerwise out", option="layerwise")
        refuse_packed(model, self)
        trained = {id(param) for param in model.parameters() if param.requires_grad}
        adapted = lora_model(model, self.rank)
        layers: list[Any] = [module for module in adapted.modules() if hasattr(module, "get_delta_weight")]
        merged = {id(layer.get_base_layer().weight) for layer in layers}
        for param in adapted.parameters():
            if id(param) in trained - merged:
                param.requires_grad_(True)
        params = [param for param in adapted.parameters() if param.requires_grad]
        optimizer = optimizers.find("adamw", {"lr": 1e-4, **self.options}).build(params)
        optimizer.register_step_post_hook(_Restarts(layers, self.every, self.prune))
        return Training(adapted, [optimizer])


class _Restarts:
    """Called after each step of an optimizer: merges and starts again every so many of them."""

    def __init__(self, layers: list[Any], every: int, prune: float) -> None:
        self.layers, self.every, self.prune = layers, every, prune
        self.steps = 0

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        for layer in self.layers:
            for name in layer.active_adapters:
                layer.get_base_layer().weight.add_(layer.get_delta_weight(name))
                layer.reset_lora_parameters(name, True)
                for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight):
                    for moment in optimizer.state[factor].values():
                        if isinstance(moment, Tensor) and moment.shape == factor.shape:
                            _prune(moment, self.prune)


def _prune(moment: Tensor, share: float) -> None:
    """Set the smallest entries of a moment to zero, in place."""
    count = floor(share * moment.numel())
    if count:
        sizes = moment.abs()
        moment.masked_fill_(sizes <= sizes.flatten().kthvalue(count).values, 0)
