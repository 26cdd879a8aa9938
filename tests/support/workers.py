"""A worker of a decentralised run, as a program that `simulate`, processes and torchft run alike."""

import torch
from torch import nn

import lingrad
from lingrad import decentralized
from tests.support.models import llama, text_loss

STEPS, EVERY = 12, 4


def batch(step, number, rows=2, length=12):
    """The batch of a worker in a step."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randint(64, (rows, length), generator=generator)


def start(workers, spec, *, seed=0, lr=1e-2, scale=1.0, base="adamw", run=None, frozen=True, model=None, **rounds):
    """A model and its optimizer; what is not linear is frozen, or trains in full."""
    model = llama() if model is None else model
    if frozen:
        for name, param in model.named_parameters():
            param.requires_grad_("proj" in name)
    options = {"lr": lr, "scale": scale, "seed": seed, **(run or {})}
    made = decentralized.Rounds(workers=workers, **{"every": EVERY, **rounds})
    return model, lingrad.adapt(model, {"*proj*": spec}, base, rounds=made, **options)


def program(workers, spec, *, steps=STEPS, before=None, first=None, **options):
    """Train, from step 0 or from the step that was joined in, and say what came of it.

    Args:
        workers: The workers.
        spec: The config string.
        steps: How many there are.
        before: Called with the step before it.
        first: A list to which the steps finished are appended where the worker has joined a run.
    """
    model, optimizer = start(workers, spec, **options)
    step, joined = 0, 0
    while step < steps:
        if before is not None:
            before(step)
        optimizer.zero_grad()
        text_loss(model, batch(step, workers.number)).backward()
        optimizer.step()
        step += 1
        if first is not None and len(first) > joined:
            joined, step = len(first), first[-1]
    return {"weights": weights(optimizer), "step": step}


def weights(optimizer):
    """The effective weights, copied."""
    return {name: weight.detach().clone() for name, weight in optimizer.weights().items()}


class Small(nn.Module):
    """Two linear layers with a bias each, of no square weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(9, 12), nn.Linear(12, 7)
        self.to(torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def inputs(step, number):
    generator = torch.Generator().manual_seed(100 * step + number)
    x, y = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (9, 7))
    return x, y


def loss_of(model, step, number):
    x, y = inputs(step, number)
    return (model(x) - y).square().mean()


RUN = {"lr": 1e-2, "weight_decay": 0.1}
