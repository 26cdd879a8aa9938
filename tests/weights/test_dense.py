"""Weights stored as plain tensors."""

import torch
from torch import nn

import lingrad


def test_a_merge_reaches_a_weight_whose_strides_allow_no_view():
    """A channels_last convolution: its matrix [out, in * 9] is a copy."""
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3)).double().to(memory_format=layout)
        optimizer = lingrad.wrap(model, {"*": "svd(rank=2, every=2)"}, "sgd", lr=0.1)
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        start = model[0].weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert not torch.equal(model[0].weight, start)
        weights.append(model[0].weight.detach().contiguous())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)
