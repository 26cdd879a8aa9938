"""The study of addresses: every entry trains, on a small model, and the table in the docs is that of the runs."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import pretraining
from benchmarks.corpus import Corpus
from benchmarks.pretraining import RESULTS, Entry, Pretraining, entries, table
from lingrad.models import LlamaShape

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch, tmp_path):
    shape = LlamaShape(hidden=32, intermediate=48, layers=1, heads=2, length=16)
    for name, value in (("STEPS", 10), ("ROWS", 2), ("HELD", 4), ("SHAPE", shape)):
        monkeypatch.setattr(pretraining, name, value)
    ids = torch.randint(0, 256, (2000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Pretraining, "_corpus", lambda self: Corpus("random", ids[:1000], ids[1000:], 256))
    return tmp_path / "found.jsonl"


def test_entries_are_told_apart():
    every = list(entries())
    assert len({entry.name for entry in every}) == len(set(every)) == len(every)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("entry", list(entries()), ids=lambda entry: entry.name)
def test_every_entry_trains(entry, small):
    found = Pretraining(small).train(entry, 1.0, 1)
    assert 4.0 < found["loss"] < 7.0  # of random bytes, log 256 is 5.5
    assert found["bytes"] > 0


def test_rates_are_tuned_on_other_text_than_results_are_of(small):
    entry, study = Entry("x", 0, "full", rest="same"), Pretraining(small)
    assert study.train(entry, 1.0, 0)["loss"] != study.train(entry, 1.0, 1)["loss"]


def test_where_there_are_no_addresses_it_says_how_to_fetch_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run `make addresses`"):
        Pretraining(tmp_path / "found.jsonl").train(Entry("x", 0, "full", rest="same"), 1.0, 0)


def test_the_table_in_the_docs_is_that_of_the_runs():
    page = (ROOT / "docs/methods.md").read_text()
    assert f"<!-- pretraining:begin -->\n{table(Pretraining(ROOT / RESULTS))}\n<!-- pretraining:end -->" in page


def test_the_decision_page_repeats_figures_of_the_studies_only():
    study, page = (ROOT / "docs/methods.md").read_text(), (ROOT / "docs/which-method.md").read_text()
    repeated = re.findall(r"\d+\.\d+ ± \d+\.\d+", page)
    assert all(figure in study for figure in repeated)


def test_every_run_has_a_line():
    lines = (ROOT / RESULTS).read_text().splitlines()
    keys = [(json.dumps(run["entry"], sort_keys=True), run["factor"], run["seed"]) for run in map(json.loads, lines)]
    assert len(set(keys)) == len(keys)
