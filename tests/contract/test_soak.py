"""Long runs, many runs, and runs that are interrupted: memory stays, and the trajectory is that of the run without."""

import gc
import resource

import pytest
import torch
from torch import nn

import lingrad
from tests.support.runs import MODES, each_mode

pytestmark = pytest.mark.slow

RULES = {"0": "svd(rank=4, every=5)", "2": "power(rank=4, every=7)", "4": "random(rank=4, every=3)", "6": "pca(rank=4)"}


class Faulty(nn.Module):
    """The identity, which raises in its forward or its backward when it is told to."""

    def __init__(self):
        super().__init__()
        self.error = None
        self.where = None

    def forward(self, x):
        if self.where == "forward":
            raise self.error
        return _Faulty.apply(x, self)


class _Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.layer.where == "backward":
            raise ctx.layer.error
        return grad, None


class Fragile(torch.optim.SGD):
    """SGD with momentum whose step fails, before it changes anything, where it is told to."""

    error = None

    def step(self, closure=None):
        if Fragile.error is not None:
            raise Fragile.error
        return super().step(closure)


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), Faulty(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), Faulty(), nn.Linear(16, 16)
    ).double()


def batch(i):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def attempt(model, optimizer, i):
    optimizer.zero_grad()
    (model(batch(i)) - batch(i + 1)).square().mean().backward()
    optimizer.step()


@pytest.fixture(autouse=True)
def others_are_not_counted():
    """What earlier tests of this process left behind may go away at any time: it is kept out of what is counted."""
    gc.collect()
    gc.freeze()


def living():
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter) and one.layout == torch.strided]
    return len(tensors), sum(one.untyped_storage().nbytes() for one in tensors)


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


PLAIN, ROTATED, LAYERWISE = {}, {"share": None, "carry": "rotate", "weight_decay": 0.1}, {"layerwise": True}


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("optimizer", PLAIN),
        ("adapter", ROTATED),
        ("optimizer", LAYERWISE),
        pytest.param("adapter", PLAIN, marks=pytest.mark.exhaustive),
        pytest.param("optimizer", ROTATED, marks=pytest.mark.exhaustive),
        pytest.param("adapter", LAYERWISE, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_memory_is_flat_over_thousands_of_steps(mode, options):
    model = build()
    optimizer = MODES[mode](model, RULES, "adamw", lr=1e-4, **options)
    for i in range(100):
        attempt(model, optimizer, i)
    optimizer.zero_grad()
    before, peak = living(), peak_mib()
    for i in range(100, 2000):
        attempt(model, optimizer, i)
    optimizer.zero_grad()
    assert living() == before
    assert peak_mib() - peak < 20  # MiB; one leaked gradient of 2 kB a step would be 4, a graph of one 40
    assert all(bool(weight.isfinite().all()) for weight in optimizer.weights().values())


def test_memory_is_flat_over_hundreds_of_runs():
    model = build()

    def use(i):
        mode = list(MODES)[i % 2]
        optimizer = MODES[mode](model, RULES, "adamw", lr=1e-4, layerwise=i % 5 == 0)
        attempt(model, optimizer, i)
        if i % 3 == 0:
            optimizer.switch(list(MODES)[1 - i % 2])
            attempt(model, optimizer, i)
        optimizer.detach()
        model.zero_grad()

    for i in range(30):
        use(i)
    before, peak = living(), peak_mib()
    for i in range(500):
        use(i)
    assert living() == before
    assert peak_mib() - peak < 20  # MiB; a run has 60 kB, of which 500 would be 30
    assert all(type(param) is nn.Parameter and param.requires_grad for param in model.parameters())
    assert not [name for name, _ in model.named_modules() if "lingrad" in name]


@each_mode
@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
def test_a_run_that_is_interrupted_goes_on_as_the_one_that_is_not(mode, error):
    found = []
    for fails in (False, True):
        model = build()
        optimizer = MODES[mode](model, RULES, Fragile, lr=1e-2, momentum=0.9)
        for i in range(60):
            where = ("forward", "backward", "step")[i // 2 % 3]
            if fails and i % 2:
                layer = model[1 if i % 4 == 1 else 5]
                layer.error, layer.where = error, where
                Fragile.error = error if where == "step" else None
                try:
                    with pytest.raises(type(error)):
                        attempt(model, optimizer, i)
                finally:
                    layer.where = Fragile.error = None
                if where == "step":  # what has its gradients still is stepped again
                    optimizer.step()
                    continue
            attempt(model, optimizer, i)
        found.append(optimizer.weights())
    for name, weight in found[0].items():
        assert torch.equal(found[1][name], weight), name


def test_nothing_is_left_of_a_run_that_could_not_be_made():
    model = build()
    before = [(name, type(module)) for name, module in model.named_modules()]
    for _ in range(100):
        with pytest.raises(lingrad.errors.LingradError):
            lingrad.adapt(model, {**RULES, "6": "svd(rank=400)"}, lr=1e-2)
        with pytest.raises(lingrad.errors.LingradError):
            lingrad.wrap(model, RULES, "adamw", lr=1e-2, bettas=(0.9, 0.99))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
