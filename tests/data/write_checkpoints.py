"""Write small checkpoints in this revision's format: ``python tests/data/write_checkpoints.py FOLDER``.

Run at the last commit that wrote a format, before it changes; the tests load what it wrote for ever after. Public names only,
so that it runs on every revision.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import lingrad

BEFORE, AFTER = 5, 7  # steps before the checkpoint and after it: refreshes fall on both


class Attention(nn.Module):
    """Layers that read one input, which share a basis with ``share="input"``."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 10)
        self.out = nn.Linear(22, 8)

    def forward(self, x):
        return self.out(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1).tanh())


def build():
    """The model, float64, with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(Attention(), nn.Linear(8, 8), nn.LayerNorm(8)).double()


CASES = {
    "optimizer": ("optimizer", "0.*: svd(rank=2, every=3); 1: pca(rank=2)", {"weight_decay": 0.1, "scale": 0.5}),
    "adapter": ("adapter", "0.*: power(rank=2, every=3, side=both); 1: random(rank=2, every=4)", {"carry": "rotate"}),
    "shared": ("optimizer", "*: svd(rank=2, every=3, side=right)", {"share": "input", "stagger": True, "weight_decay": 0.1}),
    "contained": (
        "adapter",
        "*: svd(rank=2, every=3, side=right)",
        {"share": "input", "ledger": True, "self_contained": True, "weight_decay": 0.1},
    ),
    "kron": ("adapter", "*: kron(left=svd(rank=2, every=3), right=random(rank=3, every=4))", {"ledger": True}),
    "learned": ("optimizer", "*: kron(left=pca(rank=2, every=2), right=random(rank=3, every=4))", {}),
    "layerwise": ("optimizer", "*: power(rank=2, every=2)", {"layerwise": True, "ledger": True}),
    "eightbit": ("optimizer", "*: svd(rank=2, every=3)", {"moments": "8bit", "min_8bit_size": 8}),
    "galore": ("optimizer", "*: svd(rank=2, every=3)", {"compat": "galore"}),
}


def batches(steps):
    """Inputs [4, 8] for each step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(steps)]


def train(model, opt, xs):
    """Steps on some batches."""
    for x in xs:
        opt.zero_grad()
        (model(x) - x.roll(1, -1)).square().mean().backward()
        opt.step()


def make(name):
    """A run before its first step: (model, optimizer)."""
    mode, rules, options = CASES[name]
    model = build()
    return model, (lingrad.wrap if mode == "optimizer" else lingrad.adapt)(model, rules, "adamw", lr=1e-2, **options)


def write(folder):
    """Write every case: the state after BEFORE steps, the inputs of AFTER more, and the weights these lead to."""
    folder.mkdir(parents=True, exist_ok=True)
    xs = batches(BEFORE + AFTER)
    for name in CASES:
        model, opt = make(name)
        train(model, opt, xs[:BEFORE])
        opt.zero_grad()
        saved = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        torch.save(saved, folder / "part.pt")
        saved = torch.load(folder / "part.pt", weights_only=True)
        train(model, opt, xs[BEFORE:])
        found = {"inputs": torch.stack(xs[BEFORE:]), "weights": {k: v.detach().clone() for k, v in opt.weights().items()}}
        torch.save(saved | found, folder / f"{name}.pt")
    (folder / "part.pt").unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
