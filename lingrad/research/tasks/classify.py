"""Classification of texts: a model of transformers, on a file of texts with labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import DataError, optional, require
from lingrad.research.rows import deal, read_rows, shuffled
from lingrad.research.task import Part, Task
from lingrad.research.tokens import open_tokenizer


@dataclass(frozen=True)
class Classify(Task):
    """Texts with labels, shuffled once for all runs: a fifth is for results, a tenth for tuning, the rest is trained on.

    Args:
        data: A file of JSON lines, a JSON list, or Parquet.
        model: A folder with a model of transformers and its tokenizer; it gets a new classifier on top.
        text: The key of the text.
        label: The key of the label, a whole number from 0 or a word.
        rows: Texts in a batch.
        length: Tokens that are read of a text.
        held: Texts that a model is judged by, at most.
    """

    data: str
    model: str
    text: str = "text"
    label: str = "label"
    rows: int = 16
    length: int = 64
    held: int = 2000

    metric = "accuracy"
    greater = True

    def __post_init__(self) -> None:
        """Check the sizes."""
        for option in ("rows", "length", "held"):
            require(getattr(self, option) >= 1, option, f"task 'classify': '{option}' must be 1 or more")

    @override
    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(seed)  # of the classifier
        kind = optional("transformers", "classifying texts", "hf").AutoModelForSequenceClassification
        count = 1 + max(label for _, label in self._rows)
        model: nn.Module = kind.from_pretrained(self.folder / self.model, num_labels=count, ignore_mismatched_sizes=True).to(
            dtype
        )
        return model

    @override
    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        for rows in shuffled(self._parts["training"], steps=steps, size=self.rows, seed=seed):
            yield self._batch(rows)

    @override
    def judge(self, model: nn.Module, part: Part) -> Mapping[str, float]:
        held = sorted(self._parts[part], key=lambda row: len(row[0]))[: self.held]
        device = next(model.parameters()).device
        right, loss = 0, 0.0
        for start in range(0, len(held), self.rows):
            batch = {key: value.to(device) for key, value in self._batch(held[start : start + self.rows]).items()}
            output: Any = model(**batch)
            right += int((output.logits.argmax(-1) == batch["labels"]).sum())
            loss += float(output.loss) * len(batch["labels"])
        return {"accuracy": right / len(held), "loss": loss / len(held)}

    @cached_property
    def _rows(self) -> list[tuple[str, int]]:
        path = self.folder / self.data
        rows = [(str(row[self.text]), row[self.label]) for row in read_rows(path, self.text, self.label)]
        labels = sorted({label for _, label in rows}, key=str)
        numbers = all(type(label) is int and label >= 0 for label in labels)
        code = {label: label if numbers else i for i, label in enumerate(labels)}
        if len(rows) < 10 or len(labels) < 2:
            raise DataError(f"{path} has {len(rows)} rows of {len(labels)} labels; expected ten rows and two labels at least")
        return [(text, code[label]) for text, label in rows]

    @cached_property
    def _parts(self) -> dict[str, list[tuple[str, int]]]:
        return deal(self._rows)

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.folder / self.model)

    def _batch(self, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*rows, strict=True)
        found = self._tokenizer(list(texts), truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        return {**found, "labels": torch.tensor(labels)}
