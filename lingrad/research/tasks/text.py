"""Language modelling on a text: a Llama from nothing, or a model of transformers, by bytes or other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import DataError, require
from lingrad.files.reading import read_text
from lingrad.models import next_token_loss
from lingrad.research import corpus
from lingrad.research.addresses import find_addresses, read_addresses
from lingrad.research.rows import SUFFIXES, read_rows
from lingrad.research.task import Part, Task
from lingrad.research.tasks.language import PRESETS, build_model, check_task, window_loss
from lingrad.research.tokens import BYTES, Encoder, byte_ids, encoder_of, open_tokenizer, train_bpe

ADDRESSES = "state-of-the-union"


@dataclass(frozen=True)
class Text(Task):
    """Windows of a text; the first eight tenths are trained on, the ninth is for tuning, the last for results.

    Args:
        data: ``moby-dick``, which is in the package; ``state-of-the-union``, which ``make addresses`` fetches: addresses up to
            1999 are trained on, the first half of the later ones is for tuning, the other for results; a file, of text, JSON
            lines or Parquet; or a folder whose ``*.txt`` are read in the order of their names, or its ``*.jsonl`` and
            ``*.parquet`` where it has none. A line end is put between two texts.
        column: Of JSON and Parquet: the key of the text.
        model: ``small`` (see ``hidden``), a Llama by name, ``llama-60m`` to ``llama-70b``, or a folder with a model of
            transformers, whose weights are trained further.
        tokenizer: ``bytes``; ``bpe``, a byte-level BPE that is trained on what the model is trained on; or a folder with a
            tokenizer of transformers. A model's folder has its own, which is used.
        vocabulary: Of ``bpe``: how many tokens it has.
        rows: Windows in a batch.
        length: Tokens of a window.
        hidden: Of ``small``: its width; the MLP's is 2.7 times as large, and a head has 32.
        layers: Of ``small``.
        held: Windows that a model is judged by.
    """

    data: str = "moby-dick"
    column: str = "text"
    model: str = "small"
    tokenizer: str = "bytes"
    vocabulary: int = 0
    rows: int = 8
    length: int = 128
    hidden: int = 128
    layers: int = 2
    held: int = 64

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_task("text", self, "rows", "hidden", "layers", "held")
        if self.tokenizer == "bpe":
            require(
                self.vocabulary > BYTES, "vocabulary",
                f"task 'text': 'bpe' needs 'vocabulary', more than the {BYTES} bytes, not {self.vocabulary}",
            )  # fmt: skip
        else:
            require(self.vocabulary == 0, "vocabulary", "task 'text': 'vocabulary' is for tokenizer = \"bpe\"; leave it out")
        require(
            self.tokenizer == "bytes" or self.model in PRESETS, "tokenizer",
            f"task 'text': the model {self.model} has a tokenizer of its own; leave 'tokenizer' out",
        )  # fmt: skip

    @override
    def check(self) -> None:
        if self.tokenizer == "bpe":  # which each run trains
            self._text() if self.data != ADDRESSES else find_addresses(self.folder)
        else:
            _ = self._read

    @override
    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        vocabulary = BYTES if self.tokenizer == "bytes" else self._read[1]
        return build_model(self, vocabulary, seed=seed, dtype=dtype)

    @override
    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        text = self._read[0]["training"]
        for _ in range(steps):
            starts = torch.randint(len(text) - self.length, (self.rows,), generator=generator).tolist()
            yield torch.stack([text[start : start + self.length] for start in starts])

    @override
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return next_token_loss(model, batch)

    @override
    def judge(self, model: nn.Module, part: Part) -> Mapping[str, float]:
        return {"loss": window_loss(model, self._read[0][part], length=self.length, count=self.held, rows=self.rows)}

    @cached_property
    def _read(self) -> tuple[Mapping[str, Tensor], int]:
        """The token ids of each part, and how many there are."""
        if self.data == ADDRESSES:
            earlier, later = read_addresses(find_addresses(self.folder))
            encoder = self._encoder(earlier)
            training, rest = encoder.encode(earlier), encoder.encode(later)
            found = [training, rest[: len(rest) // 2], rest[len(rest) // 2 :]]
        else:
            text = self._text()
            encoder = self._encoder(_tenths(text)[0])
            if self.tokenizer == "bpe":  # no merge reads over the edge of a part
                found = [encoder.encode(part) for part in _tenths(text)]
            else:
                found = _tenths(encoder.encode(text))
        shortest = min(len(ids) for ids in found)
        if shortest <= self.length:
            raise DataError(
                f"{self.data} is too short: its shortest part has {shortest} tokens, and a window {self.length}; expected "
                "more in each, of eight tenths, one and one"
            )
        return dict(zip(("training", "tuning", "final"), found, strict=True)), encoder.vocabulary

    def _encoder(self, training: str) -> Encoder:
        if self.model not in PRESETS:
            return encoder_of(open_tokenizer(self.folder / self.model))
        if self.tokenizer == "bytes":
            return Encoder(BYTES, byte_ids)
        if self.tokenizer == "bpe":
            return train_bpe(training, self.vocabulary, self.cache_folder)
        return encoder_of(open_tokenizer(self.folder / self.tokenizer))

    def _text(self) -> str:
        if self.data == "moby-dick":
            return corpus.moby_dick()
        path = self.folder / self.data
        files = [path]
        if path.is_dir():
            files = sorted(path.glob("*.txt")) or sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")])
            if not files:
                raise DataError(f"there is no *.txt, *.jsonl or *.parquet in {path}")
        return "\n".join(text for file in files for text in self._texts(file))

    def _texts(self, file: Any) -> list[str]:
        if file.suffix not in SUFFIXES:
            return [read_text(file)]
        found = [row[self.column] for row in read_rows(file, self.column)]
        wrong = next((number for number, text in enumerate(found, start=1) if not isinstance(text, str)), None)
        if wrong is not None:
            raise DataError(f"{file}, row {wrong}: '{self.column}' is no text; another key is named by 'column'")
        return found


def _tenths(whole: Any) -> list[Any]:
    """Eight tenths, one and one of a text or of token ids."""
    tenth = len(whole) // 10
    return [whole[: 8 * tenth], whole[8 * tenth : 9 * tenth], whole[9 * tenth : 10 * tenth]]
