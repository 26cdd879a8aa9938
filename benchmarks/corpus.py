"""Texts of benchmarks, one token per byte, split by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lingrad.research.tokens import byte_ids

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """A tokenized text.

    Args:
        name: Its name in reports.
        train: Token ids, int64 [N]: the first nine tenths of the text.
        valid: Token ids, int64 [M]: its last tenth.
        vocabulary: Number of token ids.
    """

    name: str
    train: Tensor
    valid: Tensor
    vocabulary: int


def tokenize(name: str, text: str) -> Corpus:
    """Split a text by position and read its UTF-8 bytes as tokens.

    Bytes, because the model sees only some 60,000 tokens: of a vocabulary of thousands, most embeddings would be trained only
    a few times.

    Args:
        name: Its name in reports.
        text: The text.

    Returns:
        The corpus.
    """
    tokens = byte_ids(text)
    cut = int(len(tokens) * (1 - VALIDATION_SHARE))
    return Corpus(name, tokens[:cut], tokens[cut:], 256)


def training_batches(corpus: Corpus, *, steps: int, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the training part; the same seed gives the same windows.

    Args:
        corpus: The text.
        steps: Number of batches.
        rows: Windows in a batch.
        length: Tokens in a window.
        seed: Seed of the positions.

    Yields:
        Token ids, int64 [rows, length].
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(corpus.train) - length, (rows,), generator=generator).tolist()
        yield torch.stack([corpus.train[start : start + length] for start in starts])


def validation_batches(corpus: Corpus, *, rows: int, length: int, batches: int) -> list[Tensor]:
    """Windows spread evenly over the validation part.

    Args:
        corpus: The text.
        rows: Windows in a batch.
        length: Tokens in a window.
        batches: Number of batches.

    Returns:
        Token ids, int64 [rows, length] each.
    """
    starts = torch.linspace(0, len(corpus.valid) - length, rows * batches).long().tolist()
    windows = torch.stack([corpus.valid[start : start + length] for start in starts])
    return list(windows.split(rows))
