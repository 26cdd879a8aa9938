"""What fewer bits of moments, bases and weights cost in loss: ``python -m benchmarks.lowbit [TABLE ...]`` (twenty minutes).

A small Llama is trained on the first part of Moby-Dick, quantised, and trained on. Tables: moments, weights, bases, roundings.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

import lingrad
from benchmarks.corpus import tokenize, training_batches, validation_batches
from lingrad.console import align
from lingrad.memory import moments as lowbit
from lingrad.models import LlamaShape, build_llama, next_token_loss
from lingrad.research.corpus import moby_dick
from lingrad.subspaces.subspace import Subspace

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


def bases(started: nn.Module) -> str:
    """Losses after training on with bases in other numbers of bits."""
    rows: list[tuple[str, ...]] = [("bases", "validation loss", "bytes of bases")]
    for label, spec in (
        ("32 bits", SPEC),
        ("`coded`, 8 bits", f"coded(each={SPEC}, bits=8)"),
        ("`coded`, 4 bits", f"coded(each={SPEC}, bits=4)"),
    ):
        losses, nbytes = [], 0
        for seed in SEEDS:
            model = copy.deepcopy(started)
            optimizer = lingrad.wrap(model, spec, lr=LR)
            train(model, optimizer, STEPS, seed + 1)
            losses.append(validate(model))
            held = {id(t): t for t, what in optimizer.held() if what == "basis"}
            nbytes = sum(t.numel() * t.element_size() for t in held.values())
        rows.append((label, shown(losses), f"{nbytes:,}"))
    return table(rows)


class Taken:
    """Which share of each S z a weight takes, <W_new - W_old, S z> / |S z|^2 over all merges of all weights."""

    def __init__(self) -> None:
        self.along = self.whole = 0.0
        self._add = Subspace.add

    def __enter__(self) -> Taken:
        def add(sub: Subspace, coords: Tensor) -> Any:
            before, lift = sub.weight.dense().double(), sub.map().lift(sub.coords.detach().double())
            before = before.clone()
            found = self._add(sub, coords)
            self.along += float(((sub.weight.dense().double() - before) * lift).sum())
            self.whole += float(lift.square().sum())
            return found

        Subspace.add = add  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Subspace.add = self._add  # type: ignore[method-assign]


def roundings(started: nn.Module) -> str:
    """Losses after training on with merges that round in other ways, at two rates, and what arrives of a step."""
    rows: list[tuple[str, ...]] = [("weights", "`rounding`", "learning rate", "validation loss", "of a step taken")]
    plain = copy.deepcopy(started).to(torch.bfloat16)
    eight = quantized(started, "int8")
    kinds = (("bfloat16", plain, ("nearest", "stochastic", "compensated")), ("int8", eight, ("stochastic", "compensated")))
    for rate in (LR, LR / 10):
        for name, base, ways in (("float32", started, ("",)), *kinds):
            for way in ways:
                losses = []
                with Taken() as taken:
                    for seed in SEEDS:
                        model = copy.deepcopy(base)
                        options: dict[str, Any] = {"rounding": way} if way else {}
                        train(model, lingrad.wrap(model, SPEC, lr=rate, **options), STEPS, seed + 1)
                        losses.append(validate(model))
                rows.append((name, f"`{way}`" if way else "", f"{rate:g}", shown(losses), f"{taken.along / taken.whole:.0%}"))
    return table(rows)


TABLES = {"moments": moments, "weights": weights, "bases": bases, "roundings": roundings}


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    started = build_llama(SHAPE, seed=0)
    train(started, torch.optim.AdamW(started.parameters(), lr=3e-3), BEFORE, 0)
    sys.stdout.write(f"start: {validate(started):.4f}\n")
    for name in sys.argv[1:] or TABLES:
        sys.stdout.write(f"\n{TABLES[name](started)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
