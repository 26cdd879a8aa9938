"""What breaks the duality, done in spite of the refusals, and how far optimizer mode and adapter mode part."""

from contextlib import contextmanager

import torch

from lingrad.optimizers import checks
from lingrad.testing.training import token_batches, token_loss, train, trajectories
from tests.support.models import gap, zoo

RULES = {"*": "svd(rank=4, every=3)"}
RUN = {"lr": 1e-2, "scale": 0.25}


@contextmanager
def unchecked():
    """Switch off what refuses a base, to measure what the refusal is for."""
    check = checks.check_reads_only_gradients
    checks.check_reads_only_gradients = lambda base: None
    try:
        yield
    finally:
        checks.check_reads_only_gradients = check


def part(rules=RULES, base="adamw", **options):
    """The gap between the modes."""
    with unchecked():
        wrapped, adapted, _ = trajectories(zoo, rules, base, token_batches(7), token_loss, **RUN | options)
    return gap(adapted, wrapped)


def decaying(params, lr):
    return torch.optim.AdamW(params, lr=lr, weight_decay=1.0)


class TrustRatio(torch.optim.SGD):
    """LARS and LAMB in one line: a step as long as the parameter is."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_((p.detach().norm() + 1e-3) / p.grad.norm().clamp_min(1e-12))
        return super().step(closure)


def clipped(by_full_norm):
    """A run that refreshes at every step, clipped by the norm of the coordinates' gradients or of the full ones."""
    import lingrad

    model = zoo()
    optimizer = lingrad.wrap(model, {"*": "svd(rank=4, every=1)"}, "sgd", lr=0.1)
    for batch, *_ in token_batches(7):
        optimizer.zero_grad()
        token_loss(model, batch).backward()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if group["kind"] != "coords"]
        targets = [sub.pending.total.norm() for sub in optimizer.subspaces]
        full = torch.stack([*targets, *(g.norm() for g in grads)]).norm()
        norm = optimizer.clip_grad_norm_(float("inf"))
        factor = 0.1 / (full if by_full_norm else norm)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(factor)
        optimizer.step()
    return optimizer.weights()


def scaled(inside):
    """SGD with the factor 1/4 inside the map, or on the learning rate of the coordinates."""
    import lingrad
    from lingrad.maps import KroneckerMap

    model = zoo()
    optimizer = lingrad.wrap(model, {"*": "random(rank=4, every=0)"}, "sgd", lr=0.1, **({} if inside else {"scale": 0.25}))
    if inside:
        for sub in optimizer.subspaces:
            factors = [None if b is None else b / 4 for b in (sub.map().left, sub.map().right)]
            sub.basis._map = KroneckerMap(*factors)
    train(model, optimizer, token_batches(7), token_loss)
    return optimizer.weights()


def measure():
    """(what, relative difference of the weights after seven steps), for docs/duality.md and a test."""
    return [
        ("weight decay 1.0 inside the base (refused)", part(base=decaying)),
        (
            "Adafactor's parameter scaling (refused)",
            part({"*": "svd(rank=4, every=0)"}, "adafactor", scale_parameter=True, lr=2.0),
        ),
        ("a trust ratio, as in LARS and LAMB (refused)", part(base=TrustRatio, lr=2.0)),
        (
            "unaligned signs and carried moments, `svd(align=false)`",
            part({"*": "svd(rank=4, every=3, side=long, align=false)"}, amsgrad=True),
        ),
        (
            "clipping by the norm of full gradients, in optimizer mode, against clipping in coordinates",
            gap(clipped(True), clipped(False)),
        ),
        ("a factor inside S, with SGD, against `scale`", gap(scaled(True), scaled(False))),
    ]
