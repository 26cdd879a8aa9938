"""The study of SmolLM2: every entry trains, on a small model, and the table in the docs is that of the runs."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import smollm2
from benchmarks.smollm2 import SmolLM2, entries, table

transformers = pytest.importorskip("transformers", reason="make test installs it (extra: hf)")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/studies/smollm2.jsonl"


@pytest.fixture
def small(monkeypatch, tmp_path):
    for name, value in (("STEPS", 10), ("ROWS", 2), ("LENGTH", 8), ("HELD", 2)):
        monkeypatch.setattr(smollm2, name, value)
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    text = torch.randint(0, 30, (1000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(SmolLM2, "_data", lambda self: (transformers.LlamaForCausalLM(config), text))
    return tmp_path / "found.jsonl"


@pytest.mark.thinned(3)
@pytest.mark.parametrize("entry", list(entries()), ids=lambda entry: entry.name)
def test_every_entry_trains(entry, small):
    found = SmolLM2(small).train(entry, 1.0, 1)
    assert 2.0 < found["loss"] < 6.0  # of random tokens, log 30 is 3.4
    assert found["bytes"] > 0


def test_rates_are_tuned_on_other_text_than_results_are_of(small):
    entry = next(entries())
    assert SmolLM2(small).train(entry, 1.0, 0)["loss"] != SmolLM2(small).train(entry, 1.0, 1)["loss"]


def test_the_table_in_the_docs_is_that_of_the_runs():
    page = (ROOT / "docs/methods.md").read_text()
    assert f"<!-- smollm2:begin -->\n{table(SmolLM2(RESULTS))}\n<!-- smollm2:end -->" in page


def test_every_run_has_a_line_and_a_value():
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    keys = [(json.dumps(run["entry"], sort_keys=True), run["factor"], run["seed"]) for run in runs]
    assert len(set(keys)) == len(keys)
    assert all("error" not in run for run in runs)
