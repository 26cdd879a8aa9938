"""GaLore and a one-sided LoRA written out for one small model, without a line of the package: the oracle of test_reference.py.

The model is y = W3 tanh(W2 tanh(W1 x + b)), its loss the mean square error. A side without a basis has the identity, so that
every map is S z = P z Q^T.
"""

import hashlib
import re

import torch

SHAPES = {"first.weight": (9, 14), "first.bias": (9,), "second.weight": (16, 9), "third.weight": (6, 16)}
BIAS, *MATRICES = sorted(SHAPES)
EVERY, RANK = 7, 3


def start():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 3 for name, shape in SHAPES.items()}


def data(steps, micro=2, rows=5):
    """(x, y) of each micro-batch of each step."""
    draws = torch.randn(steps, micro, rows, 14 + 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [[(xy[:, :14], xy[:, 14:]) for xy in step] for step in draws]


def gradients(weights, adapters, micro_batches, wanted):
    """Of the mean loss, with x W^T + x (P z Q^T)^T for the layers that have an adapter (P, z, Q)."""

    def layer(x, name):
        y = x @ weights[name].T
        if name not in adapters:
            return y
        p, z, q = adapters[name]
        return y + x @ q @ z.T @ p.T

    total = 0.0
    for x, y in micro_batches:
        hidden = torch.tanh(layer(x, "first.weight") + weights[BIAS])
        total = total + (layer(torch.tanh(layer(hidden, "second.weight")), "third.weight") - y).square().mean()
    return dict(zip(wanted, torch.autograd.grad(total / len(micro_batches), list(wanted.values())), strict=True))


def bases(gradient, side, old):
    """(P, Q): leading singular vectors, or the identity; where there are old ones, in their directions."""
    u, _, vh = torch.linalg.svd(gradient)
    m, n = gradient.shape
    side = {"short": "right" if m >= n else "left", "long": "left" if m >= n else "right"}.get(side, side)
    p = torch.eye(m, dtype=torch.float64) if side == "right" else u[:, :RANK]
    q = torch.eye(n, dtype=torch.float64) if side == "left" else vh[:RANK].T
    if old is None:
        return p, q
    return tuple(torch.where((new * was).sum(0) < 0, -new, new) for new, was in zip((p, q), old, strict=True))


def carried(memory, carry, old, new):
    """The moments after a refresh: kept, dropped, m <- S_new^T S_old m and v <- its square on squares, or as LDAdam has it."""
    if carry == "reset":
        return {}
    if carry == "rotate" and old is not None:
        a, b = (now.T @ was for now, was in zip(new, old, strict=True))
        turned = {"m": a @ memory["m"] @ b.T}
        return memory | (turned | {"v": a**2 @ memory["v"] @ (b**2).T} if "v" in memory else turned)
    if carry == "transport" and old is not None and "v" not in memory:
        return carried(memory, "rotate", old, new)
    if carry == "transport" and old is not None:
        a, b = (now.T @ was for now, was in zip(new, old, strict=True))
        one, two = 1 - 0.9 ** memory["t"], 1 - 0.999 ** memory["t"]
        mean, square = memory["m"] / one, memory["v"] / two
        guess = (a**2 @ (square - mean**2) @ (b**2).T + (a @ mean @ b.T) ** 2).abs()
        return memory | {"m": a @ memory["m"] @ b.T, "v": two * guess}
    return memory


def update(memory, gradient, base, lr, eps):
    """What AdamW (Loshchilov and Hutter) or SGD with momentum 0.9 adds."""
    t = memory["t"] = memory.get("t", 0) + 1
    if base == "sgd":
        memory["m"] = gradient if t == 1 else 0.9 * memory["m"] + gradient
        return -lr * memory["m"]
    memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * gradient
    memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * gradient**2
    mean, square = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
    return -lr * mean / (square.sqrt() + eps)


def fed_back(memory, error, base, carry, old, new):
    """LDAdam's error of a step, and of what a mean of gradients loses with its basis: b/(1-b) (P m Q^T - P' m' Q'^T).

    The mean of SGD with momentum is a sum, and is left out.
    """
    if old is None or base == "sgd" or "m" not in memory:
        return error
    before, after = memory["m"], carried(memory, carry, old, new).get("m", 0.0 * memory["m"])
    return error + 0.9 / 0.1 * (old[0] @ before @ old[1].T - new[0] @ after @ new[1].T)


def hashed(*parts):
    """The first 63 of 64 bits of BLAKE2b of what a colon joins."""
    return int(hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).hexdigest(), 16) >> 1


def along_residual(sizes, name, rest, small, projected, side, residual, rate, t):
    """Fira's step along G - P P^T G Q Q^T, FRUGAL's signs, or 1/q of it with probability q; ``small`` is that of z."""
    if residual == "sign":
        return -rate * rest.sign()
    if residual.startswith("sampled"):
        q = float(re.search("q=(.*)[)]", residual)[1])
        drawn = hashed(hashed(0, name), "whole", t) < q * 2**63
        return -rest / q * small.norm() / projected.norm() if drawn else 0.0 * rest
    across = {"left": 0, "right": 1, "both": (0, 1)}[side]
    step = -rest * small.norm(dim=across, keepdim=True) / (projected.norm(dim=across, keepdim=True) + 1e-8)
    size = step.norm() / rate
    limit = 1.01 * sizes.get(name, torch.inf)
    sizes[name] = min(size, limit)
    return step * min(1.0, limit / size)


def galore(steps, side, base, *, lr, decay, scale, eps=1e-8, align=True, carry="keep", residual=None, clip=None):
    """W <- (1 - lr decay) W + scale P opt(P^T G Q) Q^T, with P and Q from the SVD of G at steps 0, T, 2T."""
    weights, memories, chosen = start(), {name: {} for name in SHAPES}, {}
    errors, lost, sizes = dict.fromkeys(SHAPES, 0.0), {}, {}
    for step, micro_batches in enumerate(steps):
        wanted = {name: weight.requires_grad_() for name, weight in weights.items()}
        found = gradients(weights, {}, micro_batches, wanted)
        if residual == "feedback":
            found = {name: gradient + errors[name] for name, gradient in found.items()}
        for name, gradient in found.items():
            if name != BIAS and step % EVERY == 0:
                old, chosen[name] = chosen.get(name), bases(gradient, side, chosen.get(name) if align else None)
                lost[name] = fed_back(memories[name], 0.0, base, carry, old, chosen[name])
                memories[name] = carried(memories[name], carry, old, chosen[name])
        if clip is not None:
            small = [g if name == BIAS else chosen[name][0].T @ g @ chosen[name][1] for name, g in found.items()]
            factor = min(1.0, clip / (torch.stack([part.norm() for part in small]).norm() + 1e-6))
            found = {name: factor * gradient for name, gradient in found.items()}
        for name, gradient in found.items():
            decayed = (1 - lr * decay) * weights[name].detach()
            if name == BIAS:
                weights[name] = decayed + update(memories[name], gradient, base, lr, eps)
            else:
                p, q = chosen[name]
                projected = p.T @ gradient @ q
                small = scale * update(memories[name], projected, base, lr, eps)
                weights[name] = decayed + p @ small @ q.T
                rest = gradient - p @ projected @ q.T
                if residual == "feedback":
                    errors[name] = rest + lost.pop(name, 0.0)
                elif residual is not None:
                    weights[name] += along_residual(sizes, name, rest, small, projected, side, residual, lr * scale, step)
    return weights


def lora(steps, side, base, *, lr, decay, scale, eps=1e-8, align=True, carry="keep"):
    """W0 frozen, z trained at the learning rate scale lr, and merged into W0 when P and Q change; both decay."""
    weights, memories, adapters = start(), {name: {} for name in SHAPES}, {}
    for step, micro_batches in enumerate(steps):
        if step % EVERY == 0:
            old = {name: (p, q) for name, (p, _, q) in adapters.items()}
            weights |= {name: weights[name] + p @ z @ q.T for name, (p, z, q) in adapters.items()}
            full = {name: weights[name].clone().requires_grad_() for name in MATRICES}
            for name, gradient in gradients({**weights, **full}, {}, micro_batches, full).items():
                p, q = bases(gradient, side, old.get(name) if align else None)
                memories[name] = carried(memories[name], carry, old.get(name), (p, q))
                adapters[name] = p, torch.zeros_like(p.T @ gradient @ q), q
        trained = {BIAS: weights[BIAS].requires_grad_(), **{name: adapters[name][1].requires_grad_() for name in MATRICES}}
        for name, gradient in gradients(weights, adapters, micro_batches, trained).items():
            rate = lr if name == BIAS else lr * scale
            moved = (1 - lr * decay) * trained[name].detach() + update(memories[name], gradient, base, rate, eps)
            if name == BIAS:
                weights[name] = moved
            else:
                weights[name] = (1 - lr * decay) * weights[name]
                adapters[name] = adapters[name][0], moved, adapters[name][2]
    return weights | {name: weights[name] + p @ z @ q.T for name, (p, z, q) in adapters.items()}
