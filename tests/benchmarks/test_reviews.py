"""The study of film reviews: every entry trains, on a small model, and the table in the docs is that of the runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import reviews
from benchmarks.reviews import RESULTS, Entry, Reviews, entries, table

transformers = pytest.importorskip("transformers", reason="make test installs it (extra: hf)")
ROOT = Path(__file__).parents[2]


def build(_, seed):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=50,
    )
    model = transformers.BertForSequenceClassification(config)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def tokenized(texts, **_):
    ids = torch.tensor([[ord(letter) % 30 for letter in text] for text in texts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def small(monkeypatch, tmp_path):
    for name, value in (("STEPS", 4), ("ROWS", 4), ("HELD", 8), ("TEST", 8)):
        monkeypatch.setattr(reviews, name, value)
    rows = [(f"{number:08d}", number % 2) for number in range(64)]
    monkeypatch.setattr(Reviews, "_data", lambda self: (SimpleNamespace(build=build), None, rows, tokenized))
    return tmp_path / "found.jsonl"


def test_entries_are_told_apart():
    every = list(entries())
    assert len({entry.name for entry in every}) == len(set(every)) == len(every)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("entry", list(entries()), ids=lambda entry: entry.name)
def test_every_entry_trains(entry, small):
    found = Reviews(small).train(entry, 1.0, 1)
    assert 0.0 <= found["loss"] <= 1.0
    assert found["bytes"] > 0


def test_bytes_are_those_that_a_run_adds(small):
    """By hand: bases on the longer sides; coordinates, which hold one number between steps, with a gradient and two moments."""
    entry = Entry("x", 0, "random(rank=4, every=0, kind=orthonormal, side=long)")
    study = Reviews(small)
    sides = [(48, 48)] * 5 + [(64, 48)] * 2  # of query, key, value, the attention's output, the pooler; the two of the MLP
    classifier = 2 * 48  # its bias is frozen with the others
    assert study.train(entry, 1.0, 1)["bytes"] == 4 * (sum(4 * long + 12 * short + 1 for long, short in sides) + 3 * classifier)
    lora = study.train(Entry("y", 0, "lora", rank=4), 1.0, 1)["bytes"]
    assert lora == 4 * (4 * sum(4 * (long + short) for long, short in sides) + 3 * (classifier + 2))  # added, and those three


def test_the_table_in_the_docs_is_that_of_the_runs():
    page = (ROOT / "docs/methods.md").read_text()
    assert f"<!-- reviews:begin -->\n{table(Reviews(ROOT / RESULTS))}\n<!-- reviews:end -->" in page
