"""A study of docs/methods.md: a small Llama pretrained on presidents' addresses, by many methods with the same trials each.

    python -m benchmarks.pretraining [--out FILE] [--only WORD ...] [--into PAGE]   go on where FILE ends; print or put it

``make addresses`` fetches the text. It is read byte by byte, up to 1999 to train on and after it to judge by. The rule of
tuning is that of `benchmarks.study`: the learning rate is tuned on one half of the later text, and results are of the other.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

import lingrad
from benchmarks.corpus import Corpus, training_batches
from benchmarks.study import TUNE, Study, command, linear, taken
from benchmarks.study import table as study_table
from lingrad.errors import DataError
from lingrad.models import LlamaShape, build_llama, next_token_loss
from lingrad.research.addresses import ARCHIVE, read_addresses
from lingrad.research.tokens import BYTES, byte_ids

RESULTS = Path("docs/studies/pretraining.jsonl")
SHAPE = LlamaShape(hidden=128, intermediate=344, layers=4, heads=4, length=128)
STEPS, ROWS, LR, REST = 400, 8, 1e-3, 0.016
HELD = 128  # windows of each half of the later text


class Entry(NamedTuple):
    """One way to train.

    Args:
        name: Its name in the table.
        start: The first power of two that is tried as the factor of the learning rate, 0.001.
        spec: The config string of the linear weights but the head; ``full`` for AdamW on all weights.
        rest: What trains in full, embeddings, head and norms: at the ``same`` rate, or at one of its ``own``, 0.016, which is
            the best of GaLore's one rate.
        scale: See `lingrad.wrap`.
        carry: The same.
        residual: The same.
        mode: ``optimizer`` or ``adapter``.
    """

    name: str
    start: int
    spec: str
    rest: str = "own"
    scale: float = 1.0
    carry: str = "keep"
    residual: str | None = None
    mode: str = "optimizer"


def entries() -> Iterator[Entry]:
    """Every entry.

    Yields:
        The entries; ranks are a quarter of the width, as the GaLore paper's are.
    """
    yield Entry("AdamW, all weights", 2, "full", rest="same")
    yield Entry("AdamW, two rates", 1, "full()")
    yield Entry("svd, one rate for all, scale 0.25 (GaLore)", 3, "svd(rank=32, every=50)", rest="same", scale=0.25)
    yield Entry("svd", 2, "svd(rank=32, every=50)")
    yield Entry("svd, transport", 2, "svd(rank=32, every=50)", carry="transport")
    yield Entry("power at every step, transport", 2, "power(rank=32, every=1)", carry="transport")
    yield Entry("random, redrawn", 2, "random(rank=32, every=50, kind=orthonormal)", carry="transport")
    yield Entry("random, long side, fixed", 2, "random(rank=32, every=0, kind=orthonormal, side=long)")
    yield Entry("svd, scaled", 2, "svd(rank=32, every=50)", residual="scaled")
    yield Entry("svd, sign", 2, "svd(rank=32, every=50)", residual="sign(factor=0.1)")
    for rule in ("scaled", "feedback"):
        spec = "power(rank=32, every=1)"
        yield Entry(f"power at every step, transport, {rule}", 2, spec, carry="transport", residual=rule)
    rows = "random(rank=32, every=50, kind=rows)"
    yield Entry("random rows, rotate, sign", 2, rows, carry="rotate", residual="sign(factor=0.1)")
    yield Entry("svd, adapter mode", 2, "svd(rank=32, every=50)", mode="adapter")


class Pretraining(Study[Entry]):
    """The runs of this study.

    Args:
        path: Their file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Entry)
        self._read: Corpus | None = None

    def _corpus(self) -> Corpus:
        if self._read is None:
            try:
                train, valid = (byte_ids(text) for text in read_addresses(ARCHIVE))
            except DataError as error:
                sys.exit(str(error))
            self._read = Corpus("addresses", train, valid, BYTES)
        return self._read

    @override
    def train(self, entry: Entry, factor: float, seed: int) -> dict[str, Any]:
        corpus = self._corpus()
        model = build_llama(SHAPE, seed=seed)
        optimizer = prepare(entry, model, LR * factor, seed)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear(step, STEPS))
        for ids in training_batches(corpus, steps=STEPS, rows=ROWS, length=SHAPE.length, seed=seed):
            optimizer.zero_grad()
            next_token_loss(model, ids).backward()
            optimizer.step()
            schedule.step()
        half = len(corpus.valid) // 2
        judged = corpus.valid[:half] if seed == TUNE else corpus.valid[half:]
        return {"loss": judge(model, judged), "bytes": taken(model, optimizer, whole=entry.residual is not None)}


def judge(model: nn.Module, text: Tensor) -> float:
    """The loss on windows spread over a text, nats a byte."""
    count = min(HELD, len(text) // SHAPE.length)
    windows = text[: len(text) // count * count].view(count, -1)[:, : SHAPE.length]
    with torch.no_grad():
        return statistics.mean(float(next_token_loss(model, part)) for part in windows.split(16))


def prepare(entry: Entry, model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    """The optimizer of an entry."""
    if entry.spec == "full":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    options: dict[str, Any] = {"rest_lr": REST} if entry.rest == "own" else {}
    if entry.residual is not None:
        options["residual"] = entry.residual
    make: Any = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[entry.mode]
    optimizer: torch.optim.Optimizer = make(
        model, entry.spec, lr=lr, scale=entry.scale, carry=entry.carry, seed=seed, **options
    )
    return optimizer


def table(study: Pretraining) -> str:
    """The table of docs/methods.md.

    Args:
        study: The runs.

    Returns:
        Markdown.
    """
    return study_table(study, entries(), "full()", ("loss, nats a byte", "less AdamW's, two rates"), lr=LR, digits=3)


if __name__ == "__main__":
    command(__doc__, Pretraining, entries(), table, "pretraining")
