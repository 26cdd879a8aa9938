"""Language modelling on a text: a Llama from nothing, on bytes, or a model of transformers with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import DataError, SpecError, optional, require
from lingrad.models import LLAMAS, LlamaShape, build_llama, load_model, next_token_loss
from lingrad.research import corpus
from lingrad.research.task import Part, Task


@dataclass(frozen=True)
class Text(Task):
    """Windows of a text; the first eight tenths are trained on, the ninth is for tuning, the last for results.

    Args:
        data: ``moby-dick``, which is in the package, a file, or a folder whose ``*.txt`` are read in the order of their names.
        model: ``small`` (see ``hidden``), a Llama by name, ``llama-60m`` to ``llama-70b``, or a folder with a model of
            transformers and its tokenizer, whose weights are trained further. Only the last reads other tokens than bytes.
        rows: Windows in a batch.
        length: Tokens of a window.
        hidden: Of ``small``: its width; the MLP's is 2.7 times as large, and a head has 32.
        layers: Of ``small``.
        held: Windows that a model is judged by.
    """

    data: str = "moby-dick"
    model: str = "small"
    rows: int = 8
    length: int = 128
    hidden: int = 128
    layers: int = 2
    held: int = 64

    def __post_init__(self) -> None:
        """Check the sizes."""
        for option in ("rows", "hidden", "layers", "held"):
            require(
                getattr(self, option) >= 1, option, f"task 'text': '{option}' must be 1 or more, not {getattr(self, option)}"
            )
        require(self.length >= 2, "length", f"task 'text': 'length' must be 2 or more tokens, not {self.length}")
        require(self.hidden % 32 == 0, "hidden", f"task 'text': 'hidden' must be a multiple of 32, not {self.hidden}")
        known = self.model in ("small", *LLAMAS) or Path(self.model).name != self.model or self.model.startswith(".")
        if not known:
            raise SpecError(
                f"task 'text': there is no model '{self.model}'; known: small, {', '.join(LLAMAS)}, or a folder, ./model",
                option="model",
            )

    @override
    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        if self._folder is not None:
            model: nn.Module = load_model(self._folder).to(dtype)
            return model
        small = LlamaShape(
            256, self.hidden, 8 * round(self.hidden * 8 / 3 / 8), self.layers, max(1, self.hidden // 32), self.length
        )
        return build_llama(LLAMAS.get(self.model, small), seed=seed, dtype=dtype)

    @override
    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        text = self._part(0, 8)
        for _ in range(steps):
            starts = torch.randint(len(text) - self.length, (self.rows,), generator=generator).tolist()
            yield torch.stack([text[start : start + self.length] for start in starts])

    @override
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return next_token_loss(model, batch)

    @override
    def judge(self, model: nn.Module, part: Part) -> Mapping[str, float]:
        text = self._part(8, 9) if part == "tuning" else self._part(9, 10)
        starts = torch.linspace(0, len(text) - self.length, min(self.held, len(text) // self.length)).long().tolist()
        windows = torch.stack([text[start : start + self.length] for start in starts])
        device = next(model.parameters()).device
        return {"loss": mean(float(next_token_loss(model, ids.to(device))) for ids in windows.split(self.rows))}

    @property
    def _folder(self) -> Path | None:
        return None if self.model in ("small", *LLAMAS) else self.folder / self.model

    @cached_property
    def _tokens(self) -> Tensor:
        if self.data == "moby-dick":
            text = corpus.moby_dick()
        else:
            path = self.folder / self.data
            files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
            if not files:
                raise DataError(f"there is no *.txt in {path}")
            text = "\n".join(corpus.read_text(file) for file in files)
        if self._folder is None:
            ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        else:
            tokenizer = optional("transformers", "reading a tokenizer", "hf").AutoTokenizer.from_pretrained(self._folder)
            ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        if len(ids) // 10 <= self.length:
            raise DataError(
                f"{self.data} is too short: a tenth of it is {len(ids) // 10} tokens, and a window is {self.length}"
            )
        return ids

    def _part(self, first: int, last: int) -> Tensor:
        tenth = len(self._tokens) // 10
        return self._tokens[first * tenth : last * tenth]
