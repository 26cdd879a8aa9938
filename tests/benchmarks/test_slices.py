"""The study of slices: its rule of tuning, the bytes it counts, and the tables that are in the docs."""

from pathlib import Path

import pytest
import torch

import lingrad
from benchmarks import slices, study
from benchmarks.slices import RESULTS, Entry, Results, entries
from benchmarks.slices_table import table

ROOT = Path(__file__).parents[2]


def test_entries_are_told_apart():
    every = list(entries())
    assert len({(entry.name, entry.workers, entry.every) for entry in every}) == len(set(every)) == len(every)


class Counted(Results):
    """Losses by a formula in place of runs."""

    def __init__(self, path, loss):
        super().__init__(path)
        self.loss, self.asked = loss, []

    def get(self, entry, factor, seed):
        self.asked.append(factor)
        return self.loss(factor)


@pytest.mark.parametrize("best", [0.25, 1.0, 4.0, 2.0**-9])
def test_tuning_goes_on_until_the_best_is_not_at_the_edge(best, tmp_path):
    entry = Entry("x", None, 0, 4)
    results = Counted(tmp_path / "found.jsonl", lambda factor: abs(torch.tensor(factor / best).log().item()))
    found = results.tune(entry)
    assert len(results.asked) == len(set(results.asked)) <= study.MOST
    if best > 2.0**-7:
        assert found == best
        assert min(results.asked) < best < max(results.asked)


@pytest.mark.thinned(3)
@pytest.mark.rare(1)
@pytest.mark.parametrize(
    "entry",
    [
        entry
        for entry in entries()
        if (entry.workers, entry.every) == (4, 50) and "by_g" not in entry.name and "sl" in entry.name
    ],
    ids=lambda entry: entry.name,
)
def test_bytes_are_those_sent(entry, monkeypatch):
    """Without what trains in full and what is compared."""
    monkeypatch.setattr(slices, "STEPS", 4)
    entry = entry._replace(every=2, spec=entry.spec.replace("every=200", "every=2").replace("every=50", "every=2"))
    found = {}

    def work(workers):
        model = slices.build_llama(slices.SHAPE, seed=0)
        opt = slices._optimizer(entry, model, 1.0, 0, workers)
        for _ in range(slices.STEPS):
            slices.next_token_loss(model, torch.randint(256, (1, 8))).backward()
            opt.step()
            opt.zero_grad()
        rest = sum(p.numel() * 4 for group in opt.param_groups[1:] for p in group["params"])
        compared = 24 + 8 * 16 * len(opt.subspaces) + 24
        found[workers.number] = workers.sent - 3 * 2 * (rest + compared), slices._sent(entry, opt, model)

    lingrad.decentralized.simulate(work, 4)
    sent, counted = found[0]
    assert sent == pytest.approx(counted, rel=2e-2 if entry.send == "8bit" else 0)  # scales of parts of 256


@pytest.mark.slow
def test_a_short_study(tmp_path, monkeypatch):
    """Runs of each kind, kept in a file and not run again."""
    monkeypatch.setattr(slices, "STEPS", 10)
    monkeypatch.setattr(study, "MOST", 3)
    path = tmp_path / "found.jsonl"
    chosen = [entry for entry in entries() if entry.workers == 4 and entry.every in (None, 10)][:9]
    for entry in chosen:
        results = Results(path)
        factor = results.tune(entry)
        for seed in study.SEEDS:
            assert 0 < results.get(entry, factor, seed) < 10
    text = path.read_text()
    again = Results(path)
    for entry in chosen:
        again.tune(entry)
    assert path.read_text() == text
    assert "DDP, AdamW" in table(again)


def test_the_tables_in_the_docs_are_those_of_the_runs():
    page = (ROOT / "docs/decentralized.md").read_text()
    assert f"<!-- slices:begin -->\n{table(Results(ROOT / RESULTS))}\n<!-- slices:end -->" in page
