"""The task of conversations: which tokens have a loss, and that it trains."""

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import DataError, SpecError
from lingrad.research.schema import Table
from lingrad.research.tasks import make_task
from lingrad.research.tasks.chat import IGNORED, Example, label_loss, mean_loss, pad, tokenize_row
from tests.support.language import save_language_model, word_tokenizer, write_rows
from tests.support.models import llama

TALK = [
    {"role": "user", "content": "how many cats"},
    {"role": "assistant", "content": "3 cats"},
    {"role": "user", "content": "a dog ?"},
    {"role": "assistant", "content": "the dog sat"},
]


def learnt(row, *, every=False, tokenizer=None):
    """The words of a row, and those that have a loss."""
    tokenizer = tokenizer or word_tokenizer()
    example = tokenize_row(tokenizer, row, every=every)
    words = tokenizer.convert_ids_to_tokens
    return " ".join(words(example.ids)), " ".join(words([label for label in example.labels if label != IGNORED]))


WHOLE = "user : how many cats assistant : 3 cats <eos> user : a dog ? assistant : the dog sat <eos>"


@pytest.mark.parametrize(
    ("row", "whole", "expected"),
    [
        ({"messages": TALK}, WHOLE, "3 cats <eos> the dog sat <eos>"),
        ({"prompt": TALK[:3], "completion": TALK[3:]}, WHOLE, "the dog sat <eos>"),
        ({"prompt": "how many ? ", "completion": "3 cats "}, "how many ? 3 cats <eos>", "3 cats <eos>"),
    ],
)
def test_the_loss_is_on_what_the_assistant_says(row, whole, expected):
    assert learnt(row) == (whole, expected)
    assert learnt(row, every=True) == (whole, whole)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    last = word_tokenizer(
        "{% for message in messages %}{% if loop.last or message.role == 'user' %}{{ message.content }} {% endif %}{% endfor %}"
    )
    assert learnt({"messages": TALK[:2]}, tokenizer=last) == ("how many cats 3 cats", "3 cats")
    with pytest.raises(DataError, match="the chat template writes an earlier message in another way where others follow"):
        learnt({"messages": TALK}, tokenizer=last)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"text": "a"}, "", "expected 'messages', or 'prompt' and 'completion'; its keys are text"),
        ({"messages": "a"}, "", "expected a list of messages, each with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "", "expected a list of messages, each with 'role' and 'content'"),
        ({"messages": TALK}, None, "the tokenizer has no chat template; give rows with 'prompt' and 'completion' as texts"),
        (
            {"messages": TALK},
            "{{ raise_exception('no user') }}",
            "the chat template of the tokenizer refuses it: TemplateError: no user",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, template, message):
    tokenizer = word_tokenizer() if template == "" else word_tokenizer(template)
    with pytest.raises(DataError) as caught:
        tokenize_row(tokenizer, row, every=False)
    assert str(caught.value) == message


def test_padding_changes_no_loss():
    examples = [Example([3, 4, 5], [IGNORED, 4, 5]), Example([6, 7, 8, 9, 10], [IGNORED, IGNORED, 8, IGNORED, 10])]
    model = llama()
    with torch.no_grad():
        expected = []
        for example in examples:
            logits = model(input_ids=torch.tensor([example.ids])).logits[0]
            losses = nn.functional.cross_entropy(logits[:-1], torch.tensor(example.ids[1:]), reduction="none")
            expected += [loss for loss, label in zip(losses, example.labels[1:], strict=True) if label != IGNORED]
        found = label_loss(model, pad(examples))
        # float64; padding changes the order of sums only
        assert float(found) == pytest.approx(float(sum(expected)) / 4, abs=1e-12)
        assert mean_loss(model, examples, rows=1) == pytest.approx(float(found), abs=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("chat")
    save_language_model(made / "model")
    numbers = torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"messages": [{"role": "user", "content": f"how many ? {n}"}, {"role": "assistant", "content": f"{n} cats"}]}
        for n in numbers
    ]
    write_rows(made / "talk.jsonl", rows)
    write_rows(made / "pairs.parquet", [{"prompt": f"how many ? {n} ", "completion": f"{n} cats "} for n in numbers])
    return made


def chat(folder, **options):
    return make_task("chat", Table({"data": "talk.jsonl", "model": "./model", **options}, "plan.toml"), folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_on": "all"},
        {"data": "pairs.parquet"},
        {"model": "small", "tokenizer": "model", "hidden": 32, "layers": 1},
    ],
)
def test_it_trains(folder, options):
    task = chat(folder, rows=4, length=32, **options)
    model = task.build(1, torch.float32)
    opt = lingrad.wrap(model, "svd(rank=8, every=10)", lr=1e-2)
    with torch.no_grad():
        before = task.judge(model, "final")["loss"]
    for batch in task.batches(30, 1):
        opt.zero_grad()
        task.loss(model, batch).backward()
        opt.step()
    with torch.no_grad():
        assert task.judge(model, "final")["loss"] < 0.7 * before
        assert task.judge(model, "tuning") != task.judge(model, "final")


def test_tokens_of_a_batch_are_those_that_are_read(folder):
    batch = next(iter(chat(folder, rows=4).batches(1, 0)))
    assert chat(folder).tokens(batch) == int(batch["attention_mask"].sum())


def test_what_a_plan_cannot_say(folder):
    for options, message in (
        ({"model": "small"}, "task 'chat': the model small has no tokenizer; name a folder with one in 'tokenizer'"),
        ({"loss_on": "bot"}, "loss_on must be one of assistant, all, not 'bot'"),
        ({"model": "tiny"}, "task 'chat': there is no model 'tiny'; known: small, llama-60m"),
    ):
        with pytest.raises(SpecError) as caught:
            chat(folder, **options)
        assert str(caught.value).startswith(message)
    with pytest.raises(DataError, match="has 0 conversations with something to learn in their first 3 tokens, of 40"):
        next(iter(chat(folder, length=3).batches(1, 0)))
    write_rows(folder / "bad.jsonl", [{"messages": TALK}, {"mesages": TALK}])
    with pytest.raises(DataError, match="bad.jsonl, row 2: expected 'messages', or 'prompt' and 'completion'"):
        next(iter(chat(folder, data="bad.jsonl").batches(1, 0)))
