"""Fine-tuning on MetaMathQA, judged by the answers to GSM8K's questions, and by what is forgotten of a plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import DataError, require
from lingrad.files.reading import read_text
from lingrad.research.rows import read_rows, shuffled
from lingrad.research.task import Part
from lingrad.research.tasks.chat import Example, Labelled, pad, tokenize_row
from lingrad.research.tasks.language import build_model, check_task, window_loss
from lingrad.research.tokens import encoder_of, open_tokenizer

QUERY = "{query}"  # what a template has in the place of a question
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PUBLISHED = (
    "MetaMathQA-395K.json (key 'data') is published at https://huggingface.co/datasets/meta-math/MetaMathQA, test.jsonl and "
    "train.jsonl of GSM8K (keys 'questions' and 'tuning_questions') at https://github.com/openai/grade-school-math, in "
    "grade_school_math/data. Nothing is downloaded: put them on disk, and name them in [task]"
)


@dataclass(frozen=True)
class MetaMath(Labelled):
    """Questions of MetaMathQA with their answers (Yu et al., 2023, arXiv 2309.12284), judged by GSM8K (Cobbe et al., 2021).

    A question counts as answered where the last number of what the model writes, greedily, is that of the answer.

    Args:
        data: MetaMathQA: a JSON list, JSON lines or Parquet, whose rows have ``query`` and ``response``.
        questions: GSM8K's test questions: JSON lines or Parquet, whose rows have ``question`` and ``answer``.
        model: A folder with a causal language model of transformers and its tokenizer.
        tuning_questions: Questions for tuning; empty takes the first fifth of ``questions``, and the others for results.
        forgetting: A file with a plain text: how much its loss has risen by the training is measured too; empty is none.
        template: What the model reads, with ``{query}`` in the place of the question.
        rows: Questions in a batch.
        length: Tokens that are read of a question with its answer, and in a window of the plain text.
        new_tokens: Tokens that the model may write for an answer.
        held: Questions that a model is judged by, at most, and windows of the plain text.
    """

    data: str
    questions: str
    model: str
    tuning_questions: str = ""
    forgetting: str = ""
    template: str = "Question: {query}\nAnswer: "
    rows: int = 8
    length: int = 768
    new_tokens: int = 300
    held: int = 2000

    metric = "accuracy"
    greater = True

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_task("metamathqa", self, "rows", "new_tokens", "held")
        require(
            QUERY in self.template, "template",
            f"task 'metamathqa': 'template' must have {QUERY} in the place of the question",
        )  # fmt: skip

    @override
    def check(self) -> None:
        for key in ("data", "questions", "tuning_questions", "forgetting"):
            name = getattr(self, key)
            if name and not (self.folder / name).is_file():
                raise DataError(f"task 'metamathqa': '{key}' names no file: {self.folder / name}. {_PUBLISHED}")

    @override
    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        self.check()
        return build_model(self, 0, seed=seed, dtype=dtype)

    @override
    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        rows = read_rows(self.folder / self.data, "query", "response")
        for drawn in shuffled(rows, steps=steps, size=self.rows, seed=seed):
            yield pad([self._example(str(row["query"]), str(row["response"])) for row in drawn])

    @override
    def judge(self, model: nn.Module, part: Part) -> Mapping[str, float]:
        asked = self._questions[part]
        written = self._answers(model, [question for question, _ in asked])
        right = sum(last_number(text) == answer for text, (_, answer) in zip(written, asked, strict=True))
        found = {"accuracy": right / len(asked)}
        if self.forgetting:
            first = next(model.parameters())
            if "loss" not in self._before:
                plain = self.build(0, first.dtype).to(first.device).eval()
                self._before["loss"] = self._plain_loss(plain)
            found["forgetting"] = self._plain_loss(model) - self._before["loss"]
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.folder / self.model)

    @cached_property
    def _before(self) -> dict[str, float]:
        """The loss of the plain text before the training, once it is known."""
        return {}

    @cached_property
    def _questions(self) -> dict[str, list[tuple[str, Decimal]]]:
        final = _read_questions(self.folder / self.questions)
        if self.tuning_questions:
            tuning = _read_questions(self.folder / self.tuning_questions)
        else:
            fifth = max(1, len(final) // 5)
            tuning, final = final[:fifth], final[fifth:]
        if not (tuning and final):
            raise DataError(f"{self.questions} has too few questions; expected two at least")
        return {"tuning": tuning[: self.held], "final": final[: self.held]}

    @cached_property
    def _plain(self) -> Tensor:
        path = self.folder / self.forgetting
        ids = encoder_of(self._tokenizer).encode(read_text(path))
        if len(ids) < self.length:
            raise DataError(f"{path} is too short: it has {len(ids)} tokens, and a window {self.length}")
        return ids

    def _plain_loss(self, model: nn.Module) -> float:
        return window_loss(model, self._plain, length=self.length, count=self.held, rows=self.rows)

    def _example(self, query: str, response: str) -> Example:
        row = {"prompt": self.template.replace(QUERY, query), "completion": response}
        ids, labels = tokenize_row(self._tokenizer, row, every=False)
        return Example(ids[: self.length], labels[: self.length])

    def _answers(self, model: nn.Module, questions: Sequence[str]) -> list[str]:
        """What the model writes after each question."""
        tokenizer, device, found = self._tokenizer, next(model.parameters()).device, list[str]()
        filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        generate: Any = model.generate
        for start in range(0, len(questions), self.rows):
            texts = [self.template.replace(QUERY, question) for question in questions[start : start + self.rows]]
            ids = [tokenizer(text)["input_ids"] for text in texts]
            longest = max(map(len, ids))
            read = torch.tensor([[filler or 0] * (longest - len(one)) + one for one in ids], device=device)
            mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids], device=device)
            written = generate(
                input_ids=read, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1,
                repetition_penalty=1.0, pad_token_id=filler, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            found += tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return found


def last_number(text: str) -> Decimal | None:
    """The last number of a text, such as 1,200.50; None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _read_questions(path: Path) -> list[tuple[str, Decimal]]:
    found = []
    for number, row in enumerate(read_rows(path, "question", "answer"), start=1):
        answer = last_number(str(row["answer"]))
        if answer is None:
            raise DataError(f"{path}, row {number}: the answer has no number")
        found.append((str(row["question"]), answer))
    return found
