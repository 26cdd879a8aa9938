"""The task of MetaMathQA: which answers count, what is forgotten, and what is said where files are missing."""

from decimal import Decimal

import pytest
import torch

import lingrad
from lingrad.errors import DataError, SpecError
from lingrad.research.execution import execute
from lingrad.research.plan import make_plan
from lingrad.research.schema import Table
from lingrad.research.tasks import make_task
from lingrad.research.tasks.chat import IGNORED
from lingrad.research.tasks.metamath import last_number
from tests.support.language import save_language_model, word_tokenizer, write_rows

OPTIONS = {"data": "math.json", "questions": "test.jsonl", "model": "./model", "rows": 4, "length": 24, "new_tokens": 6}
OPTIONS |= {"template": "Question : {query} Answer : ", "forgetting": "plain.txt"}
ANIMALS = ["cat", "dog", "mat", "bot", "user", "cats"]


@pytest.fixture
def folder(tmp_path):
    save_language_model(tmp_path / "model")
    rows = [{"query": f"how many {a} are on the {b} ?", "response": "7 is the Answer : 7"} for a in ANIMALS for b in ANIMALS]
    write_rows(tmp_path / "math.json", rows[:12])
    asked = [{"question": f"how many {a} ?", "answer": "the cat is there\n#### 7"} for a in ANIMALS]
    write_rows(tmp_path / "test.jsonl", [*asked[:5], {"question": "how many bot ?", "answer": "#### 1,007"}])
    (tmp_path / "plain.txt").write_text("the dog ran on . a cat sat then " * 20)
    return tmp_path


def math(folder, **options):
    return make_task("metamathqa", Table({**OPTIONS, **options}, "plan.toml"), folder)


def test_answers_are_learnt_and_a_text_is_forgotten(folder):
    task = math(folder)
    model = task.build(1, torch.float32)
    opt = lingrad.wrap(model, "svd(rank=8, every=10)", lr=1e-2)
    with torch.no_grad():
        before = task.judge(model.eval(), "final")
    assert before == {"accuracy": 0.0, "forgetting": 0.0}
    for batch in task.batches(40, 1):
        opt.zero_grad()
        task.loss(model.train(), batch).backward()
        opt.step()
    with torch.no_grad():
        found = task.judge(model.eval(), "final")
        assert task.judge(model, "tuning")["accuracy"] == 1.0  # the first fifth of six, one question
    assert found["accuracy"] == 0.8  # of five; the answer to one is 1,007
    assert found["forgetting"] > 0.1


def test_the_loss_is_on_the_response(folder):
    batch = next(iter(math(folder).batches(1, 0)))
    labels = [label for label in batch["labels"][0].tolist() if label != IGNORED]
    assert word_tokenizer().decode(labels) == "7 is the Answer : 7 <eos>"


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7.", 7), ("#### 1,200.50", "1200.5"), ("-3 then", -3), ("7.0", 7), ("none", None), ("it costs $18", 18)],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_questions_for_tuning_may_be_others(folder):
    write_rows(folder / "train.jsonl", [{"question": "how many ?", "answer": "#### 2"}])
    task = math(folder, tuning_questions="train.jsonl")
    assert {part: len(questions) for part, questions in task._questions.items()} == {"tuning": 1, "final": 6}


def test_missing_files_are_named_before_anything_trains(folder):
    (folder / "test.jsonl").unlink()
    content = {
        "name": "math",
        "task": {"kind": "metamathqa", "steps": 2, **OPTIONS},
        "entries": [{"name": "a", "method": "svd(rank=4)", "options": {"lr": 0.1}}],
    }
    with pytest.raises(DataError) as caught:
        execute(make_plan(content, "plan.toml", folder), folder / "out")
    message = str(caught.value)
    assert message.startswith(f"task 'metamathqa': 'questions' names no file: {folder / 'test.jsonl'}. MetaMathQA-395K.json")
    for word in ("'data'", "huggingface.co/datasets/meta-math/MetaMathQA", "github.com/openai/grade-school-math"):
        assert word in message
    assert not (folder / "out").exists()


def test_what_is_wrong_with_the_files(folder):
    write_rows(folder / "test.jsonl", [{"question": "how many ?", "answer": "none"}])
    with pytest.raises(DataError, match="test.jsonl, row 1: the answer has no number"):
        math(folder)._questions["final"].count(1)
    (folder / "plain.txt").write_text("the cat")
    with pytest.raises(DataError, match="plain.txt is too short: it has 2 tokens, and a window 24"):
        math(folder)._plain_loss(None)
    with pytest.raises(SpecError, match="task 'metamathqa': 'template' must have {query} in the place of the question"):
        math(folder, template="Question :")
    with pytest.raises(SpecError, match="there is no model 'small'; expected a folder, ./model"):
        math(folder, model="small")
