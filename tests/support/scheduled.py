"""GaLore with bases that a rule refreshes, written out for the model of `tests.support.reference` without a line of lingrad.

A rule is called with a basis's history and decides; it is given what its paper gives it: full gradients, bases, projections.
"""

import torch

from tests.support import reference
from tests.support.reference import BIAS, SHAPES


class Energy:
    """Refresh at a check where |P P^T G Q Q^T| / |G| is below a fraction of what it was, or below a number."""

    def __init__(self, every, fraction, least=0.0):
        self.every, self.fraction, self.least, self.was = every, fraction, least, None

    def wants(self, step, gradient, sides):
        if step % self.every:
            return False
        return self.was is None or energy(gradient, sides) < max(self.fraction * self.was, self.least)

    def changed(self, step, gradient, old, new):
        self.was = energy(gradient, new)

    def stepped(self, projected):
        pass


class Overlap:
    """The interval doubles where the last few refreshes gave much the same basis."""

    def __init__(self, every, threshold, after, longest=10**9):
        self.threshold, self.after, self.longest = threshold, after, longest
        self.interval, self.next, self.alike = every, 0, 0

    def wants(self, step, gradient, sides):
        return step == self.next

    def changed(self, step, gradient, old, new):
        if old is not None:
            share = torch.kron(*((b.T @ a) for a, b in zip(old, new, strict=True))).square().sum()
            share = share / (new[0].shape[1] * new[1].shape[1])
            self.alike = self.alike + 1 if share >= self.threshold else 0
        if self.alike == self.after:
            self.alike = 0
            self.interval = 2 * self.interval if 2 * self.interval <= self.longest else self.interval
        self.next = step + self.interval

    def stepped(self, projected):
        pass


class Path:
    """Refresh at a check where the mean of the unit gradients since the last refresh is short."""

    def __init__(self, every, threshold):
        self.every, self.threshold, self.units = every, threshold, None

    def length(self):
        return torch.stack(self.units).sum(0).norm() / len(self.units)

    def wants(self, step, gradient, sides):
        return self.units is None or (step % self.every == 0 and self.length() < self.threshold)

    def changed(self, step, gradient, old, new):
        self.units = []

    def stepped(self, projected):
        self.units.append(projected / projected.norm())


class Displacement(Path):
    """Algorithm 1 of Lotus: the distance of the last unit gradient from the first, over their number."""

    def length(self):
        return (self.units[-1] - self.units[0]).norm() / len(self.units)


def energy(gradient, sides):
    p, q = sides
    return (p @ p.T @ gradient @ q @ q.T).norm() / gradient.norm()


def galore(steps, side, rule, *, lr, decay, scale, carry="keep", eps=1e-8):
    """(weights, steps in which each basis changed): W <- (1 - lr decay) W + scale P adamw(P^T G Q) Q^T."""
    weights, memories, chosen = reference.start(), {name: {} for name in SHAPES}, {}
    rules, changed = {name: rule() for name in SHAPES if name != BIAS}, {name: [] for name in SHAPES if name != BIAS}
    for step, micro_batches in enumerate(steps):
        wanted = {name: weight.requires_grad_() for name, weight in weights.items()}
        for name, gradient in reference.gradients(weights, {}, micro_batches, wanted).items():
            decayed = (1 - lr * decay) * weights[name].detach()
            if name == BIAS:
                weights[name] = decayed + reference.update(memories[name], gradient, "adamw", lr, eps)
                continue
            old = chosen.get(name)
            if old is None or rules[name].wants(step, gradient, old):
                new = reference.bases(gradient, side, old)
                new = tuple(each[:size] for each, size in zip(new, gradient.shape, strict=True))
                rules[name].changed(step, gradient, old, new)
                memories[name] = reference.carried(memories[name], carry, old, new)
                chosen[name] = new
                changed[name].append(step)
            p, q = chosen[name]
            projected = p.T @ gradient @ q
            rules[name].stepped(projected)
            weights[name] = decayed + scale * p @ reference.update(memories[name], projected, "adamw", lr, eps) @ q.T
    return weights, changed
