"""Small models on weights of 4 and 8 bits."""

import pytest
import torch
from torch import nn

from lingrad.weights.bitsandbytes import packed_of

bnb = pytest.importorskip("bitsandbytes")

IN, MIDDLE, OUT = 64, 128, 8
KINDS = ("nf4", "nf4-nested", "fp4-nested", "int8")

each_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind, n, m, bias=True, **options):
    if kind == "int8":
        return bnb.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False, **options)
    quant, _, nested = kind.partition("-")
    options = {"compute_dtype": torch.float32} | options
    return bnb.nn.Linear4bit(n, m, bias=bias, quant_type=quant, compress_statistics=bool(nested), **options)


def net(kind):
    """Two quantised layers and a plain head; equal weights at every call."""
    torch.manual_seed(0)
    made = nn.Sequential(layer(kind, IN, MIDDLE), nn.Tanh(), layer(kind, MIDDLE, IN, bias=False), nn.Tanh(), nn.Linear(IN, OUT))
    return made.to("cpu")


def twin(kind):
    """The same with plain layers that hold the numbers the codes stand for."""
    model = net(kind)
    for i in (0, 2):
        old = model[i]
        model[i] = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        model[i].weight.data.copy_(packed_of(old, str(i)).dense())
        if old.bias is not None:
            model[i].bias.data.copy_(old.bias.data)
    return model


def batches(steps, rows=24):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(rows, IN, generator=generator), torch.randint(0, OUT, (rows,), generator=generator)) for _ in range(steps)
    ]


def go(model, optimizer, data, after=lambda: None):
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


def rules(spec):
    return {"0": spec, "2": spec, "*": "none"}
