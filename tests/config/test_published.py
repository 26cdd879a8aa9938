"""Runs of published methods by name, against the papers' formulas in plain torch, in float64."""

import pytest
import torch
from torch import nn

from tests.support.runs import MODES, each_mode, weights_of

EXACT = 1e-10  # float64; Adam divides rounding errors of 1e-16 by eps


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def losses(forward, steps=6):
    for step in range(steps):
        x = torch.randn(5, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        yield forward(x).square().sum()


@each_mode
@pytest.mark.parametrize("rank", [2, 4])
def test_deep_lora_by_hand(mode, rank):
    """Yaras et al., arXiv 2406.04112: W = W0 + U_r R V_r^T, U and V of the first gradient, R alone trained, by Adam."""
    model, plain = net(), net()
    w0 = plain[0].weight.detach().clone()
    next(losses(plain)).backward()
    u, _, vh = torch.linalg.svd(plain[0].weight.grad)
    left, right = u[:, :rank], vh.T[:, :rank]
    core = torch.zeros(rank, rank, dtype=torch.float64, requires_grad=True)
    plain[0].bias.requires_grad_(False)
    plain[2].requires_grad_(False)
    # U^T G V is diagonal but for rounding, which Adam divides by rounding plus eps; 1e-4 is as in the other references
    adam = torch.optim.AdamW([core], lr=1e-2, weight_decay=0.0, eps=1e-4)

    def adapted(x):
        weight = w0 + left @ core @ right.T
        return plain[2](torch.tanh(nn.functional.linear(x, weight, plain[0].bias)))

    for loss in losses(adapted):
        adam.zero_grad()
        loss.backward()
        adam.step()

    for param in (model[0].bias, *model[2].parameters()):
        param.requires_grad_(False)
    optimizer = MODES[mode](model, f"deep_lora(rank={rank})", lr=1e-2, eps=1e-4)
    for loss in losses(model):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert optimizer.refreshes() == {"0.weight": 1}
    expected = (w0 + left @ core @ right.T).detach()
    torch.testing.assert_close(weights_of(optimizer)["0.weight"], expected, rtol=0, atol=EXACT)
    assert float((expected - w0).norm()) > 1e-2  # it did train
