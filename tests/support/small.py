"""Small models and inputs in float64, for what goes wrong in a run."""

import torch
from torch import nn

from tests.support.models import train, zoo_loss

EVERYTHING = {"*": "svd(rank=1, every=2)"}

# In float64 the same sums in another order: a few thousand roundings of 1e-16 in a run of ten steps at most.
EXACT = 1e-12


def stack(m=6, n=8, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, m)).to(dtype)


def twins():
    """Two layers that are used, or not, apart from each other."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)]).double()


def inputs(seed=1, n=8, dtype=torch.float64):
    return torch.randn(5, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def squared(model, x):
    return model(x).tanh().square().sum()


def teach(model, optimizer, batches):
    """At one learning rate: a schedule that ended at zero would leave nothing for a second call."""
    train(model, optimizer, batches, zoo_loss, schedule=False)


def repeat(model, optimizer, steps=2, ids=None):
    """Steps on one batch, of token ids unless another is given."""
    ids = torch.arange(10).view(2, 5) if ids is None else ids
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def named(model):
    return dict(model.named_parameters())


def close(a, b, tolerance=EXACT):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
