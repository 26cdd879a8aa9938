"""A task of one's own: tell whether the number of ones among some bits is odd."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lingrad.research import Task


@dataclass(frozen=True)
class Parity(Task):
    """Random bits and the parity of the first three of them.

    Args:
        bits: How many there are.
        hidden: Width of the model.
        rows: Of a batch.
    """

    bits: int = 8
    hidden: int = 32
    rows: int = 64

    metric = "accuracy"
    greater = True

    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        """Three layers, all of them transformed."""
        torch.manual_seed(seed)
        layers = [nn.Linear(self.bits, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.hidden, 2)).to(dtype)

    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        """Bits, [rows, bits]."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield torch.randint(2, (self.rows, self.bits), generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The cross-entropy of the parity."""
        return nn.functional.cross_entropy(self._logits(model, batch), batch[:, :3].sum(1) % 2)

    def judge(self, model: nn.Module, part: str) -> Mapping[str, float]:
        """The share of 1,000 other rows that are right."""
        bits = torch.randint(2, (1000, self.bits), generator=torch.Generator().manual_seed(10**6 + (part == "final")))
        right = self._logits(model, bits).argmax(1) == bits[:, :3].sum(1) % 2
        return {"accuracy": float(right.float().mean())}

    def _logits(self, model: nn.Module, bits: Tensor) -> Tensor:
        return model(2 * bits.to(next(model.parameters()).dtype) - 1)
