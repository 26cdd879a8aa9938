"""The study of docs/decentralized.md: workers that each train a slice, against data parallelism and DiLoCo, at equal tokens.

    python -m benchmarks.slices [--out FILE] [--only WORD] [--cell N H] [--minutes M]   go on where FILE ends
    python -m benchmarks.slices_table [--into PAGE]                    print the tables, or put them into a page

The rule of tuning is that of `benchmarks.study`; what is tuned is the learning rate of the transformed weights, as a factor of
that of the rest. All workers are simulated in one process; the numbers are those of as many processes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

import lingrad
from benchmarks.corpus import Corpus, tokenize, training_batches, validation_batches
from benchmarks.study import Study
from lingrad.models import LlamaShape, build_llama, next_token_loss
from lingrad.research.corpus import moby_dick

RESULTS = Path("docs/studies/slices.jsonl")
SHAPE = LlamaShape(hidden=64, intermediate=172, layers=2, heads=4, length=32)
ROWS, STEPS, RANK, LR = 16, 400, 8, 1e-2
LINEAR = {"*self_attn*": "{}", "*mlp*": "{}", "*": "none"}


class Entry(NamedTuple):
    """One way to train.

    Args:
        name: Its name in the tables.
        spec: The config string of the linear weights; None for plain AdamW.
        start: The first power of two that is tried as the factor of their learning rate.
        workers: How many there are; they share out each batch.
        every: Steps of a round; None where gradients are averaged at every step.
        combine: See `lingrad.decentralized.Rounds`.
        moments: The same.
        lr: The same.
        momentum: The same.
        send: The same.
        rows: Windows of a batch, of all workers together.
    """

    name: str
    spec: str | None
    start: int
    workers: int
    every: int | None = None
    combine: str = "mean"
    moments: str = "keep"
    lr: float = 1.0
    momentum: float = 0.0
    send: str = "full"
    rows: int = ROWS


def entries() -> Iterator[Entry]:
    """Every entry, the most telling first.

    Yields:
        The entries.
    """
    yield Entry("DDP, AdamW", None, -3, 4)
    for rank in (1, RANK, 4 * RANK):
        yield Entry(f"DDP, svd r {rank}", f"svd(rank={rank}, every=50)", 0, 4)
        yield Entry(f"DDP, random r {rank}", f"random(rank={rank}, every=50, kind=orthonormal)", 0, 4)
    for workers, every in ((4, 50), (4, 10), (4, 200), (8, 50), (2, 50), (8, 10), (2, 10), (8, 200), (2, 200)):
        yield Entry("DiLoCo", "full()", -3, workers, every, lr=0.7, momentum=0.9)
        for choice, combine in (("identical", "mean"), ("independent", "sum"), ("orthogonal", "sum"), ("by_gradient", "sum")):
            yield _slices(choice, combine, workers, every)
        if (workers, every) == (4, 50):
            yield from ablations(every)
        if workers == 4 and every < 200:
            for choice, combine in (("identical", "mean"), ("independent", "sum"), ("orthogonal", "sum")):
                yield _slices(choice, combine, workers, every, rank=1)
        if workers == 4:
            yield Entry("averaged weights", "full()", -3, workers, every)
            for choice, combine in (
                ("identical", "sum"),
                ("independent", "mean"),
                ("orthogonal", "mean"),
                ("by_gradient", "mean"),
            ):
                yield _slices(choice, combine, workers, every)


def _slices(
    choice: str, combine: str, workers: int, every: int, *, rank: int = RANK, period: int = 200, **options: Any
) -> Entry:
    cut = f", workers={workers}" if choice in ("orthogonal", "by_gradient") else ""
    spec = f"slice(rank={rank}, every={period}, choice={choice}{cut})"
    words = {**({"r": rank} if rank != RANK else {}), **({"T": period} if period != 200 else {}), **options}
    more = "".join(f", {key} {value}" for key, value in words.items())
    return Entry(f"slices, {choice}, {combine}{more}", spec, 0, workers, every, combine, **options)


def ablations(every: int) -> Iterator[Entry]:
    """What decides, at four workers and one length of rounds."""
    for choice, combine in (("identical", "mean"), ("orthogonal", "sum")):
        yield _slices(choice, combine, 4, every, moments="reset")
        yield _slices(choice, combine, 4, every, period=every)
        yield _slices(choice, combine, 4, every, period=every, moments="reset")
        yield _slices(choice, combine, 4, every, period=0)
        yield _slices(choice, combine, 4, every, lr=0.7, momentum=0.9)
        yield _slices(choice, combine, 4, every, send="8bit")
        yield _slices(choice, combine, 4, every, rank=2 * RANK)
    yield _slices("identical", "mean", 4, every, rank=4 * RANK)
    for choice, combine in (("identical", "mean"), ("independent", "sum"), ("orthogonal", "sum")):
        yield _slices(choice, combine, 4, every, rows=8 * ROWS)


def schedule(step: int) -> float:
    """A tenth of the steps up, then a cosine down to a tenth."""
    rise = STEPS // 10
    return (step + 1) / rise if step < rise else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / (STEPS - rise)))


def train(entry: Entry, factor: float, seed: int, corpus: Corpus, held: list[Tensor]) -> dict[str, Any]:
    """Train once.

    Args:
        entry: How.
        factor: Of the learning rate of the linear weights.
        seed: Of weights, data and bases.
        corpus: The text.
        held: Its validation batches.

    Returns:
        ``loss``, after the last step, and ``sent``, bytes of the linear weights that a worker sends in all.
    """

    def work(workers: lingrad.decentralized.Workers | None) -> dict[str, Any]:
        model = build_llama(SHAPE, seed=seed)
        opt = _optimizer(entry, model, factor, seed, workers)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
        own = slice(None) if workers is None else slice(workers.number, None, entry.workers)
        for batch in training_batches(corpus, steps=STEPS, rows=entry.rows, length=SHAPE.length, seed=seed):
            next_token_loss(model, batch[own]).backward()
            opt.step()
            scheduler.step()
            opt.zero_grad()
        if workers is not None and workers.number:
            return {}
        with torch.no_grad():
            loss = sum(float(next_token_loss(model, batch)) for batch in held) / len(held)
        return {"loss": loss, "sent": _sent(entry, opt, model)}

    return work(None) if entry.every is None else lingrad.decentralized.simulate(work, entry.workers)[0]


def _optimizer(entry: Entry, model: nn.Module, factor: float, seed: int, workers: Any) -> torch.optim.Optimizer:
    if entry.spec is None:
        named = dict(model.named_parameters())
        linear = [param for name, param in named.items() if "proj" in name]
        rest = [param for name, param in named.items() if "proj" not in name]
        return torch.optim.AdamW([{"params": linear, "lr": LR * factor}, {"params": rest, "lr": LR}], weight_decay=0.0)
    rules = {pattern: spec.format(entry.spec) for pattern, spec in LINEAR.items()}
    if workers is None:
        return lingrad.wrap(model, rules, "adamw", lr=LR, scale=factor, seed=seed)
    rounds = lingrad.decentralized.Rounds(
        workers=workers,
        every=entry.every or 1,
        combine=entry.combine,  # type: ignore[arg-type]
        moments=entry.moments,  # type: ignore[arg-type]
        lr=entry.lr,
        momentum=entry.momentum,
        send=entry.send,  # type: ignore[arg-type]
    )
    return lingrad.adapt(model, rules, "adamw", lr=LR, scale=factor, seed=seed, rounds=rounds)


def _sent(entry: Entry, opt: Any, model: nn.Module) -> float:
    """Bytes of the linear weights that one worker sends; the few by which workers compare their options are not counted.

    Returns:
        In a ring, 2 (N - 1) / N of what is averaged and N - 1 of what is gathered; sketches of ``by_gradient``, and gradients
        that a refresh reads, among them.
    """
    each = 2 * (entry.workers - 1) / entry.workers * 4 * STEPS
    if entry.spec is None:
        return each * sum(param.numel() for name, param in model.named_parameters() if "proj" in name)
    coords = sum(sub.coords.numel() for sub in opt.subspaces)
    if entry.every is None:
        dense = sum(sub.weight.param.numel() for sub in opt.subspaces) if entry.spec.startswith("svd") else 0
        return each * (coords + dense / 50)
    of_one = {"full": 4.0, "bfloat16": 2.0, "8bit": 1 + 4 / 256}[entry.send]
    rounds = -(-STEPS // entry.every)
    if entry.spec == "full()":  # a mean, which a ring makes of 2 (N - 1) / N
        return 2 * (entry.workers - 1) / entry.workers * rounds * of_one * coords
    sketches = 0
    if "by_gradient" in entry.spec:
        refreshes = 1 + STEPS // 200
        sketches = refreshes * 4 * sum(entry.workers * RANK * min(sub.weight.param.shape) for sub in opt.subspaces)
        rounds += 1  # that after the first step
    return (entry.workers - 1) * (rounds * of_one * coords + sketches)


class Results(Study[Entry]):
    """The runs of this study.

    Args:
        path: Their file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Entry)
        self._text: tuple[Corpus, list[Tensor]] | None = None

    @override
    def train(self, entry: Entry, factor: float, seed: int) -> dict[str, Any]:
        if self._text is None:
            corpus = tokenize("Moby-Dick", moby_dick())
            self._text = corpus, validation_batches(corpus, rows=16, length=SHAPE.length, batches=16)
        return train(entry, factor, seed, *self._text)

    @override
    def label(self, entry: Entry) -> str:
        return f"{entry.name}, N {entry.workers}, H {entry.every}"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="entries whose name has this word")
    cell = "entries of N workers in rounds of H; may be given again"
    parser.add_argument("--cell", type=int, nargs=2, action="append", metavar=("N", "H"), help=cell)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    asked = parser.parse_args()
    results = Results(asked.out)
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * asked.minutes
    for entry in entries():
        if asked.only not in entry.name or (asked.cell and [entry.workers, entry.every] not in asked.cell):
            continue
        if time.monotonic() > until:
            return
        results.run(entry)


if __name__ == "__main__":
    main()
