"""From texts to token ids: bytes, a byte-level BPE that is trained on a text, or a tokenizer of a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import DataError, in_short, optional

BYTES = 256  # tokens without a merge
PIECE = 2**14  # characters that are encoded at once, at least
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?= \w)")


@dataclass(frozen=True)
class Encoder:
    """What turns a text into token ids.

    Args:
        vocabulary: Number of token ids.
        encode: A text -> its ids, int64 [N].
    """

    vocabulary: int
    encode: Callable[[str], Tensor]


def byte_ids(text: str) -> Tensor:
    """The UTF-8 bytes of a text as token ids, int64 [N], below 256."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def train_bpe(text: str, vocabulary: int) -> Encoder:
    """Train a byte-level BPE (Sennrich et al., 2016, on bytes as in GPT-2); the same text gives the same merges.

    Args:
        text: The text.
        vocabulary: Number of token ids: 256 bytes, and merges.

    Returns:
        The encoder, which has fewer token ids where the text has no more pairs to merge.
    """
    tokenizers = optional("tokenizers", "training a tokenizer", "hf")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = level
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=level.alphabet(), show_progress=False)
    trained.train_from_iterator(_pieces(text), trainer)

    def encode(other: str) -> Tensor:
        found = trained.encode_batch_fast(list(_pieces(other)))
        return torch.tensor([token for piece in found for token in piece.ids], dtype=torch.int64)

    return Encoder(trained.get_vocab_size(), encode)


def _pieces(text: str) -> Iterator[str]:
    """Pieces of a text that are encoded at the same time; they end before spaces where no token reaches across."""
    start = 0
    while start < len(text):
        found = _BETWEEN_WORDS.search(text, start + PIECE)
        end = len(text) if found is None else found.start()
        yield text[start:end]
        start = end


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; nothing is downloaded, and no code of the folder's is run.

    Args:
        folder: A folder with a tokenizer of transformers, such as that of a model.

    Returns:
        The tokenizer, of transformers.

    Raises:
        DataError: There is none.
    """
    kind = optional("transformers", "reading a tokenizer", "hf").AutoTokenizer
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; expected one with a tokenizer of transformers (nothing is downloaded)")
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a file that is no tokenizer raises whatever it leads to
        raise DataError(f"{folder} holds no tokenizer that transformers can read: {in_short(error)}") from error


def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder of a tokenizer of transformers, with the special tokens that it adds by itself.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The encoder.
    """
    return Encoder(len(tokenizer), lambda text: torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64))
