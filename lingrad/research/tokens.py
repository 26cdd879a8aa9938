"""From texts to token ids: bytes, a byte-level BPE that is trained on a text, or a tokenizer of a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import DataError, in_short, optional
from lingrad.files.atomic import write_whole

BYTES = 256  # tokens without a merge
_SCHEME = "byte-level 1"  # goes up when `_train` makes something else of the same text
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


def train_bpe(text: str, vocabulary: int, cache: Path | None = None) -> Encoder:
    """Train a byte-level BPE (Sennrich et al., 2016, on bytes as in GPT-2); the same text gives the same merges.

    Args:
        text: The text.
        vocabulary: Number of token ids: 256 bytes, and merges.
        cache: A folder in which what was trained is kept, and found again for the same text and number by the same version of
            tokenizers; several processes may use it at the same time. None is none.

    Returns:
        The encoder, which has fewer token ids where the text has no more pairs to merge.
    """
    tokenizers = optional("tokenizers", "training a tokenizer", "hf")
    file = None
    if cache is not None:
        parts = (_SCHEME, tokenizers.__version__, str(vocabulary), sha256(text.encode()).hexdigest())
        file = cache / f"bpe-{sha256(' '.join(parts).encode()).hexdigest()[:32]}.json"
    trained = _read_trained(tokenizers, file)
    if trained is None:
        trained = _train(tokenizers, text, vocabulary)
        if file is not None:
            content = trained.to_str().encode()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, sha256(content).hexdigest().encode() + b"\n" + content)

    def encode(other: str) -> Tensor:
        found = trained.encode_batch_fast(list(_pieces(other)))
        return torch.tensor([token for piece in found for token in piece.ids], dtype=torch.int64)

    return Encoder(trained.get_vocab_size(), encode)


def _read_trained(tokenizers: Any, file: Path | None) -> Any:
    """What was trained before; None where there is nothing, or not what was written."""
    try:
        checksum, _, content = b"".partition(b"\n") if file is None else file.read_bytes().partition(b"\n")
    except OSError:
        return None
    whole = checksum.decode(errors="replace") == sha256(content).hexdigest()
    return tokenizers.Tokenizer.from_str(content.decode()) if whole else None


def _train(tokenizers: Any, text: str, vocabulary: int) -> Any:
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = level
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=level.alphabet(), show_progress=False)
    trained.train_from_iterator(_pieces(text), trainer)
    return trained


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
