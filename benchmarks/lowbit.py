"""What 8 bits of moments, and 4 or 8 bits of base weights, cost in loss: ``python -m benchmarks.lowbit`` (ten minutes).

A small Llama is trained on the first part of Moby-Dick, quantised, and trained on.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

import lingrad
from lingrad.console import align
from lingrad.memory import moments as lowbit
from lingrad.models import LlamaShape, build_llama, next_token_loss
from lingrad.research.corpus import moby_dick, tokenize, training_batches, validation_batches

SHAPE = LlamaShape(hidden=128, intermediate=384, layers=2, heads=4, length=64)
ROWS, BEFORE, STEPS = 8, 400, 300
SPEC, LR = "svd(rank=16, every=50)", 2e-3
SEEDS = (0, 1, 2)
CORPUS = tokenize("Moby-Dick", moby_dick())


def validate(model: nn.Module) -> float:
    """Loss of the text's end, nats a token."""
    with torch.no_grad():
        windows = validation_batches(CORPUS, rows=16, length=SHAPE.length, batches=8)
        return sum(float(next_token_loss(model, ids)) for ids in windows) / len(windows)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Train on windows of the text's beginning."""
    for ids in training_batches(CORPUS, steps=steps, rows=ROWS, length=SHAPE.length, seed=seed):
        optimizer.zero_grad()
        next_token_loss(model, ids).backward()
        optimizer.step()


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """A copy whose linear layers but the head hold their weights in fewer bits."""
    bnb: Any = __import__("bitsandbytes")
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            m, n = module.weight.shape
            if kind == "int8":
                made = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False)
            else:
                quant, _, nested = kind.partition(" ")
                made = bnb.nn.Linear4bit(
                    n, m, bias=False, quant_type=quant, compress_statistics=bool(nested), compute_dtype=torch.float32
                )
            made.weight.data = module.weight.data.clone()
            model.set_submodule(name, made.to("cpu"))
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with plain layers that hold the numbers the codes stand for."""
    plain = build_llama(SHAPE, seed=0)
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict() and v.is_floating_point()}
    run = lingrad.adapt(model, SPEC, lr=LR)
    state |= {name: weight for name, weight in run.weights().items() if name in state or name.endswith("proj.weight")}
    run.detach()
    plain.load_state_dict(state)
    return plain


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as Markdown; the first row is the header."""
    lines = [" | ".join(line) for line in align(rows, right=[False] + [True] * (len(rows[0]) - 1))]
    rule = " | ".join("-" * (len(cell)) for cell in align(rows, right=[False] * len(rows[0]))[0])
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def shown(losses: list[float]) -> str:
    """Mean and standard error."""
    values = torch.tensor(losses, dtype=torch.float64)
    return f"{values.mean():.4f} ± {values.std() / len(losses) ** 0.5:.4f}"


def moments(started: nn.Module) -> str:
    """Losses after training on with moments in other numbers of bits."""
    rows: list[tuple[str, ...]] = [("moments", "validation loss", "bytes of moments")]
    for label, base, options in (
        ("as they are, 32-bit", "adamw", {}),
        ('`moments="8bit"`', "adamw", {"moments": "8bit"}),
        ('`moments="8bit_linear"`', "adamw", {"moments": "8bit_linear"}),
        ("`adamw8bit`", "adamw8bit", {}),
    ):
        losses, nbytes = [], 0
        for seed in SEEDS:
            model = copy.deepcopy(started)
            optimizer = lingrad.wrap(model, SPEC, base, lr=LR, **options)
            train(model, optimizer, STEPS, seed + 1)
            losses.append(validate(model))
            nbytes = lowbit.moments(optimizer).nbytes
        rows.append((label, shown(losses), f"{nbytes:,}"))
    return table(rows)


def weights(started: nn.Module) -> str:
    """Losses after training on with a base in other numbers of bits."""
    rows: list[tuple[str, ...]] = [("base", "merges", "before", "after", "lost by merges")]
    for kind in ("nf4", "nf4 nested", "int8"):
        base = quantized(started, kind)
        for label, spec, plain, keep in (
            ("its numbers in float32", SPEC, True, False),
            (kind, SPEC, False, False),
            (f"{kind}, `keep_remainder`", SPEC, False, True),
            (f"{kind}, never refreshed", SPEC.replace("every=50", "every=0"), False, False),
        ):
            losses, lost, merges = [], [], 0
            for seed in SEEDS:
                model = dequantized(base) if plain else copy.deepcopy(base)
                optimizer = lingrad.adapt(model, spec, lr=LR, keep_remainder=keep)
                train(model, optimizer, STEPS, seed + 1)
                losses.append(validate(model))
                found = optimizer.merge_losses().values()
                merges = max((loss.merges for loss in found), default=0)
                lost += [loss.total for loss in found if loss.merges]
            mean = f"{sum(lost) / len(lost):.1%}" if lost else "-"
            rows.append((label, str(merges) if not plain else "-", f"{validate(base):.4f}", shown(losses), mean))
    return table(rows)


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    started = build_llama(SHAPE, seed=0)
    train(started, torch.optim.AdamW(started.parameters(), lr=3e-3), BEFORE, 0)
    sys.stdout.write(f"start: {validate(started):.4f}\n\n{moments(started)}\n\n{weights(started)}\n")


if __name__ == "__main__":
    main()
