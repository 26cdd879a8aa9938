"""Fine-tuning on conversations, or on prompts and their completions: the loss is on what the assistant says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import DataError, in_short, require, require_one_of
from lingrad.research.rows import deal, read_rows, shuffled
from lingrad.research.task import Part, Task
from lingrad.research.tasks.language import PRESETS, build_model, check_task
from lingrad.research.tokens import open_tokenizer

LossOn = Literal["assistant", "all"]
IGNORED = -100  # the label of a token without a loss, as in transformers


class Example(NamedTuple):
    """A tokenized text.

    Args:
        ids: Its token ids.
        labels: The same, or `IGNORED` where a token has no loss.
    """

    ids: list[int]
    labels: list[int]


class Labelled(Task):
    """A task whose batches are tokens with ``labels``, of which some count and some do not: the loss is on those that do."""

    @override
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return label_loss(model, batch)

    @override
    def tokens(self, batch: Any) -> int:
        return int(batch["attention_mask"].sum())

    @override
    def weight(self, batch: Any) -> float:
        return label_count(batch)


@dataclass(frozen=True)
class Chat(Labelled):
    """Conversations, shuffled once for all runs: a fifth is for results, a tenth for tuning, the rest is trained on.

    Args:
        data: A file of JSON lines, a JSON list, or Parquet. Its rows have ``messages``, each a mapping of ``role`` and
            ``content``, or ``prompt`` and ``completion``: texts, or lists of messages.
        model: A folder with a causal language model of transformers and its tokenizer; or ``small`` (see ``hidden``), or a
            Llama by name, ``llama-60m`` to ``llama-70b``, with random weights, where ``tokenizer`` is given.
        tokenizer: A folder with a tokenizer of transformers; empty is the model's.
        loss_on: Tokens with a loss: those of the ``assistant``, or of the completion, or ``all``.
        rows: Conversations in a batch.
        length: Tokens that are read of a conversation; what follows is cut.
        hidden: Of ``small``: its width; the MLP's is 2.7 times as large, and a head has 32.
        layers: Of ``small``.
        held: Conversations that a model is judged by, at most.
    """

    data: str
    model: str
    tokenizer: str = ""
    loss_on: str = "assistant"
    rows: int = 8
    length: int = 512
    hidden: int = 128
    layers: int = 2
    held: int = 500

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_task("chat", self, "rows", "hidden", "layers", "held")
        require_one_of(self.loss_on, get_args(LossOn), "loss_on")
        require(
            self.model not in PRESETS or bool(self.tokenizer), "tokenizer",
            f"task 'chat': the model {self.model} has no tokenizer; name a folder with one in 'tokenizer'",
        )  # fmt: skip

    @override
    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        return build_model(self, len(self._tokenizer), seed=seed, dtype=dtype)

    @override
    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        for examples in shuffled(self._parts["training"], steps=steps, size=self.rows, seed=seed):
            yield pad(examples)

    @override
    def judge(self, model: nn.Module, part: Part) -> Mapping[str, float]:
        return {"loss": mean_loss(model, self._parts[part][: self.held], self.rows)}

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.folder / (self.tokenizer or self.model))

    @cached_property
    def _parts(self) -> dict[str, list[Example]]:
        path, examples = self.folder / self.data, list[Example]()
        rows = read_rows(path)
        for number, row in enumerate(rows, start=1):
            try:
                example = tokenize_row(self._tokenizer, row, every=self.loss_on == "all")
            except DataError as error:
                raise DataError(f"{path}, row {number}: {error}") from error
            cut = Example(example.ids[: self.length], example.labels[: self.length])
            if any(label != IGNORED for label in cut.labels[1:]):  # the first has nothing before it to be told by
                examples.append(cut)
        if len(examples) < 10:
            raise DataError(
                f"{path} has {len(examples)} conversations with something to learn in their first {self.length} tokens, of "
                f"{len(rows)}; expected ten at least"
            )
        return deal(examples)


def tokenize_row(tokenizer: Any, row: Any, *, every: bool) -> Example:
    """Tokenize a conversation, or a prompt and its completion.

    Args:
        tokenizer: A tokenizer of transformers.
        row: ``messages``, or ``prompt`` and ``completion``.
        every: Whether every token has a loss, not only what the assistant says.

    Returns:
        The example.

    Raises:
        DataError: The row has neither, or the tokenizer's template does not do.
    """
    keys = set(row) if isinstance(row, Mapping) else set()
    if "messages" in keys:
        return _conversation(tokenizer, _messages(row["messages"]), 0, every=every)
    if not {"prompt", "completion"} <= keys:
        raise DataError(f"expected 'messages', or 'prompt' and 'completion'; its keys are {', '.join(sorted(keys)) or 'none'}")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion + (tokenizer.eos_token or "")
        return _encode(tokenizer, text, [(0 if every else len(prompt), len(text))], special=True)
    first = _messages(prompt)
    return _conversation(tokenizer, [*first, *_messages(completion)], len(first), every=every)


def _messages(found: Any) -> list[dict[str, Any]]:
    whole = isinstance(found, Sequence) and not isinstance(found, str) and len(found) > 0
    if not whole or not all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in found):
        raise DataError("expected a list of messages, each with 'role' and 'content'")
    return [dict(one) for one in found]


def _conversation(tokenizer: Any, messages: list[dict[str, Any]], first: int, *, every: bool) -> Example:
    """A conversation as the template writes it; the assistant's messages from the ``first`` on have a loss."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give rows with 'prompt' and 'completion' as texts")

    def render(count: int, *, opened: bool = False) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # a template may raise whatever it likes
            raise DataError(f"the chat template of the tokenizer refuses it: {in_short(error)}") from error
        return text

    whole = render(len(messages))
    if every:
        return _encode(tokenizer, whole, [(0, len(whole))], special=False)
    spans = []
    for number, message in enumerate(messages[first:], start=first):
        if message["role"] == "assistant":  # the template adds its words to what is before it and the opening of the turn
            before, after = render(number, opened=True), render(number + 1)
            if not (whole.startswith(before) and whole.startswith(after)):
                raise DataError(
                    "the chat template writes an earlier message in another way where others follow, so that the assistant's "
                    'words cannot be found; split the conversation into one row for each answer, or take loss_on = "all"'
                )
            spans.append((len(before), len(after)))
    return _encode(tokenizer, whole, spans, special=False)


def _encode(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], *, special: bool) -> Example:
    """Tokenize a text of which some spans of characters have a loss; a token belongs to the span that it begins in."""
    if not tokenizer.is_fast:
        raise DataError("the tokenizer is one without offsets; expected a fast one, with a tokenizer.json")
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids: list[int] = found["input_ids"]
    learnt = [any(low <= start < high and end > start for low, high in spans) for start, end in found["offset_mapping"]]
    return Example(ids, [token if loss else IGNORED for token, loss in zip(ids, learnt, strict=True)])


def pad(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch of examples, padded behind.

    Args:
        examples: The examples.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 [rows, length of the longest].
    """
    longest = max(len(example.ids) for example in examples)

    def column(parts: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor([[*part, *[filler] * (longest - len(part))] for part in parts])

    return {
        "input_ids": column([example.ids for example in examples], 0),
        "attention_mask": column([[1] * len(example.ids) for example in examples], 0),
        "labels": column([example.labels for example in examples], IGNORED),
    }


def label_loss(model: nn.Module, batch: Mapping[str, Tensor], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the tokens that have a label, in the dtype of the logits.

    Args:
        model: A causal language model of transformers.
        batch: As `pad` makes it.
        reduction: ``mean`` or ``sum`` over these tokens.

    Returns:
        Nats, 0-d.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
    return total if reduction == "sum" else total / max(1, label_count(batch))


def label_count(batch: Mapping[str, Tensor]) -> int:
    """How many tokens of a batch have a label, and one before them to be told by."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def mean_loss(model: nn.Module, examples: Sequence[Example], rows: int) -> float:
    """The loss of a model on examples, nats for each token that has a label.

    Args:
        model: A causal language model of transformers.
        examples: The examples.
        rows: How many at once.

    Returns:
        The mean over all these tokens.
    """
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.ids))
    total, count = 0.0, 0
    for start in range(0, len(ordered), rows):
        batch = {key: value.to(device) for key, value in pad(ordered[start : start + rows]).items()}
        total += float(label_loss(model, batch, "sum"))
        count += label_count(batch)
    return total / count
