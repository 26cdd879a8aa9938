"""One layer, its inputs and a backward."""

import torch
from torch import nn


def layer(m=6, n=8, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, m, bias=bias)).double()


def inputs(seed=1, rows=5, n=8):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(model, seed=1):
    model(inputs(seed)).square().sum().backward()
