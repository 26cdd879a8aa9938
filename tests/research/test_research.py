"""Texts, plans, the runner's measurements and the report."""

import dataclasses
import hashlib
import math

import pytest
import torch

import lingrad
from lingrad.errors import DataError
from lingrad.models import LlamaShape, build_llama, next_token_loss
from lingrad.research import corpus, plans, report, runner
from tests.support.models import llama, text_batches, text_loss, train

TINY = plans.Setup(
    model=LlamaShape(hidden=16, intermediate=24, layers=1, heads=2, length=8), steps=6, rows=2, eval_every=2, eval_batches=2
)


def moby_dick():
    return corpus.tokenize("Moby-Dick", corpus.moby_dick())


class TestCorpus:
    def test_the_text_is_the_one_its_notice_names(self):
        text = corpus.moby_dick()
        assert text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
        raw = text.encode()
        assert len(raw) == 1_204_997
        digest = hashlib.sha256(raw).hexdigest()
        notice = (corpus.files("lingrad.research") / "data" / "NOTICE.md").read_text()
        assert digest in notice
        assert (digest[:8], digest[-4:]) == ("fe282a57", "7240")

    @pytest.mark.parametrize("damage", [b"not xz", None])
    def test_a_damaged_text_is_noticed(self, monkeypatch, damage):
        import lzma

        packed = damage or lzma.compress(b"another book")

        class Folder:
            def __truediv__(self, _):
                return self

            def read_bytes(self):
                return packed

        monkeypatch.setattr(corpus, "files", lambda _: Folder())
        with pytest.raises(DataError, match="moby-dick.txt.xz is"):
            corpus.moby_dick()

    def test_the_split_is_by_position(self):
        text = moby_dick()
        joined = bytes(torch.cat((text.train, text.valid)).tolist())
        assert joined == corpus.moby_dick().encode()
        assert len(text.valid) == pytest.approx(0.1 * len(joined), abs=1)

    def test_batches_depend_on_the_seed_alone(self):
        text, size = moby_dick(), {"steps": 3, "rows": 2, "length": 5}
        torch.rand(4)
        a, b, c = (list(corpus.training_batches(text, seed=seed, **size)) for seed in (0, 0, 1))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a[0], c[0])
        assert a[0].shape == (2, 5)

    def test_validation_spans_the_last_tenth(self):
        text = moby_dick()
        batches = corpus.validation_batches(text, rows=4, length=6, batches=3)
        assert [b.shape for b in batches] == [(4, 6)] * 3
        assert torch.equal(batches[0][0], text.valid[:6])
        assert torch.equal(batches[-1][-1], text.valid[-6:])


class TestRunner:
    def test_schedule(self):
        setup = dataclasses.replace(TINY, steps=100)
        factors = [runner.learning_rate(step, setup) for step in range(100)]
        assert factors[0] == pytest.approx(0.1)
        assert factors[9] == factors[10] == 1.0
        assert factors[-1] == pytest.approx(0.1, abs=1e-3)
        assert factors[10:] == sorted(factors[10:], reverse=True)

    def test_state_bytes_are_moments_and_bases(self):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
        train(model, optimizer, text_batches(1))
        coords = sum(s.coords.numel() for s in optimizer.subspaces)
        bases = sum(t.numel() for s in optimizer.subspaces for t in s.map().tensors)
        full = sum(p.numel() for g in optimizer.param_groups[1:] for p in g["params"])
        steps = len([p for g in optimizer.param_groups for p in g["params"]])  # Adam's step counters, one float each
        assert runner.state_bytes(optimizer) == 4 * (2 * coords + bases + 2 * full + steps)

    @pytest.mark.parametrize(("spec", "kept"), [("random(rank=4)", True), ("random(rank=4, store=false)", False)])
    def test_state_bytes_of_a_random_basis(self, spec, kept):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, spec, "sgd", lr=1e-2)
        train(model, optimizer, text_batches(1))
        expected = sum(
            4 * math.prod(s) for sub in optimizer.subspaces for s in sub.basis.transform.basis_shapes(sub.basis.shape) if s
        )
        assert runner.state_bytes(optimizer) == expected
        assert bool(expected) == kept

    def test_gradient_bytes_off_and_on_a_refresh(self):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4, every=2)", lr=1e-2)
        full = sum(p.numel() for g in optimizer.param_groups[1:] for p in g["params"])
        coords = sum(s.coords.numel() for s in optimizer.subspaces)
        seen = []
        for batch in text_batches(2, micro=1, rows=8):
            optimizer.zero_grad()
            text_loss(model, batch[0]).backward()
            seen.append(runner.gradient_bytes(model, optimizer))
            optimizer.step()
        matrices = sum(math.prod(s.basis.shape) for s in optimizer.subspaces)  # 96 tokens are more than the matrices hold
        assert seen == [4 * (full + coords + matrices), 4 * (full + coords)]

    def test_gaps_compare_the_weights_of_the_forward(self):
        methods = plans.both_modes("svd(rank=2, every=3)", "x", lr=1e-2)
        records = runner.compare(methods, TINY, moby_dick(), dtype=torch.float64)
        assert [r.gaps for r in records[:1]] == [[]]
        for record in records[1:]:
            assert [step for step, _, _ in record.gaps] == [1, 2, 3, 4, 5, 6]
            assert max(gap for _, gap, _ in record.gaps) < 1e-11
        assert [step for step, _ in records[0].valid] == [0, 2, 4, 6]
        assert all(record.valid[-1][1] < record.valid[0][1] for record in records)

    def test_a_real_difference_shows_in_the_gap(self):
        methods = plans.both_modes("svd(rank=2, every=3)", "x", lr=1e-2)[:2]
        methods[1] = dataclasses.replace(methods[1], options={"lr": 2e-2})
        _, other = runner.compare(methods, TINY, moby_dick(), dtype=torch.float64)
        assert other.gaps[-1][1] > 1e-4

    def test_the_baseline_is_stock_adamw(self):
        run = runner.EntryRun(plans.full_rank(1e-2, 0.1), TINY, torch.float32)
        assert type(run.optimizer) is torch.optim.AdamW
        assert [g["initial_lr"] for g in run.optimizer.param_groups] == [pytest.approx(1e-3), 1e-2]

    def test_models_are_seeded_apart_from_the_global_generator(self):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        a, b = (build_llama(TINY.model, seed=5, dtype=dtype) for dtype in (torch.float32, torch.float64))
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(x.double(), y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    def test_float64_models_compute_in_float64(self):
        """transformers' own RMSNorm and loss round to float32 inside; ours must not."""
        model = build_llama(TINY.model, seed=0, dtype=torch.float64)
        ids = torch.arange(8)[None]
        loss = next_token_loss(model, ids)
        with torch.no_grad():
            model.model.embed_tokens.weight[3, 2] += 1e-13
        moved = next_token_loss(model, ids)
        assert loss.dtype == torch.float64
        assert 0 < abs(float((moved - loss).detach())) < 1e-12


class TestReport:
    def result(self):
        records = [
            runner.Record("plain", None, {"lr": 0.1}, [5.0, 4.0], [(0, 5.0), (2, 4.25)], [0.1, 0.2], [10, 10], 3_000_000),
            runner.Record(
                "low",
                "svd(rank=2)",
                {"lr": 0.2, "scale": 0.25},
                [5.0],
                [(0, 5.0), (2, 4.5)],
                [0.1],
                [2_000_000, 1_000_000, 1_000_000],
                100,
                [(1, 2e-7, 1e-6)],
            ),
        ]
        double = [runner.Record("low", "svd(rank=2)", gaps=[(1, 0.0, 0.0), (2, 3e-16, 1e-15)])]
        return report.make_result("a text", TINY, records, double, 1.5)

    def test_table(self):
        header, rule, *lines = report.markdown(self.result()).splitlines()
        assert len({len(line) for line in (header, rule, *lines)}) == 1
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
        assert cells == [
            list(report.HEADERS),
            ["plain", "5.00 → 4.250", "3.00", "0.00", "", "150.0", "", ""],
            ["low", "5.00 → 4.500", "0.00", "1.00", "2.00", "100.0", "2.0e-07", "3.0e-16"],
        ]

    def test_caption(self):
        lines = report.caption(self.result()).splitlines()
        assert lines[0].startswith("A Llama of width 16 with 1 layers and 256 byte tokens, 6 steps of ")
        assert lines[2:4] == ["- plain: every weight in full; lr=0.1", "- low: `svd(rank=2)`; lr=0.2, scale=0.25"]
        assert lines[-1].startswith("2 s for all of it; torch ")

    def test_save_and_load(self, tmp_path):
        result = self.result()
        report.save(result, tmp_path / "new" / "folder")
        again = report.load(tmp_path / "new" / "folder")
        assert report.markdown(again) == report.markdown(result)
        assert again.setup["model"]["hidden"] == 16
        assert again.machine["torch"] == torch.__version__

    def test_a_failing_write_leaves_the_old_file_whole(self, tmp_path, monkeypatch):
        result = self.result()
        report.save(result, tmp_path)
        before = (tmp_path / "result.json").read_bytes()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lingrad.files.atomic.os.fdopen", full)
        with pytest.raises(DataError, match="No space left on device"):
            report.save(dataclasses.replace(result, text="other"), tmp_path)
        monkeypatch.undo()
        assert (tmp_path / "result.json").read_bytes() == before
        assert {p.name for p in tmp_path.iterdir()} == {"result.json", "table.md", "loss.png", "gap.png"}

    def test_loading_what_is_no_result(self, tmp_path):
        with pytest.raises(DataError, match="holds no result of a lingrad comparison"):
            report.load(tmp_path)
        (tmp_path / "result.json").write_text("{}")
        with pytest.raises(DataError, match="holds no result of a lingrad comparison"):
            report.load(tmp_path)


def test_plans():
    methods = plans.demo_entries()
    assert len({m.label for m in methods}) == len(methods)
    twins, short = plans.in_float64(methods, plans.Setup())
    assert [m.rules for m in twins] == ["svd(rank=64, every=6)"] * 4
    assert short.steps == 30
    assert plans.refreshing("kron(left=svd(rank=4), right=svd(rank=4))", 6) == (
        "kron(left=svd(rank=4, every=6), right=svd(rank=4, every=6))"
    )
    assert plans.refreshing("full()", 6) == "full()"
    rules = "*.mlp.*: svd(rank=4); *norm*: frozen; *: none"
    assert plans.refreshing(rules, 6) == "*.mlp.*: svd(rank=4, every=6); *norm*: frozen; *: none"
