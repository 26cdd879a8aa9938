"""What is known about a GPU without one: launches by count, times by the roofline, and the script that would measure."""

import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import cards, docs, host, launches, report, roofline
from benchmarks.cards import CARDS, FLOOR, FUSED, GAP, LAUNCH
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.session import Session
from benchmarks.gpu.sizes import BUDGETS, REAL
from benchmarks.launches import Counts
from benchmarks.operators import CUDA_12, CUDA_13, Recorder, Row, cut_into
from benchmarks.plan import ADAPTER, ENTRIES, FROZEN, FULL, LORA_ONE, RANDOM, TINY
from lingrad.errors import LingradError

H200 = CARDS["H200"]


class TestLaunches:
    def test_a_linear_step(self):
        """Three products, and what mean, its gradient and SGD take; views are free."""
        with torch.device("meta"):
            layer, x = nn.Linear(8, 4, bias=False), torch.zeros(6, 8, requires_grad=True)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False, fused=False)
        with Recorder() as recorder:
            out = layer(x)
            recorder.lap("forward")
            out.backward(torch.ones_like(out))
            recorder.lap("backward")
            optimizer.step()
            recorder.lap("step")
        launched = {phase: [row.name for row in rows if row.launches] for phase, rows in recorder.phases.items()}
        assert launched == {"forward": ["mm"], "backward": ["ones_like", "mm", "mm"], "step": ["add_"]}
        (product,) = (row for row in recorder.phases["forward"] if row.launches)
        assert product == Row("mm", "product", 1, 2 * 6 * 8 * 4, 4 * (6 * 8 + 8 * 4 + 6 * 4), torch.float32, 4)
        (update,) = (row for row in recorder.phases["step"] if row.launches)
        assert update.nbytes == 3 * 4 * 32  # reads weight and gradient, writes the weight

    def test_products_that_are_added(self):
        a, b = torch.zeros(4, 4, device="meta"), torch.zeros(4, device="meta")
        with Recorder() as recorder:
            torch.addmm(b, a, a)  # the bias is added inside
            torch.addmm(a, a, a)  # the matrix is copied first
            a.addmm_(a, a)
            bool(a.any())
        assert [row.launches for row in recorder.rows] == [1, 2, 1, 1, 0]
        assert [row.reads for row in recorder.rows] == [False] * 4 + [True]

    def test_lists_are_cut_as_multi_tensor_apply_cuts_them(self):
        assert cut_into([100] * 110, 110, 320) == 1
        assert cut_into([100] * 111, 110, 320) == 2
        assert cut_into([65536 * 320], 110, 320) == 1
        assert cut_into([65536 * 320 + 1], 110, 320) == 2
        assert cut_into([65536 * 319, 65536 * 2], 110, 320) == 2  # the second tensor begins in the first launch
        assert cut_into([0, 0], 110, 320) == 0
        tensors = [torch.zeros(10, device="meta") for _ in range(120)]
        for cut, expected in ((CUDA_12, (2, 2, 3)), (CUDA_13, (1, 1, 1))):
            with Recorder(cut) as recorder:
                torch._foreach_add_(tensors, 1.0)  # one list
                torch._foreach_add_(tensors, tensors)  # two
                torch._foreach_add(tensors, tensors)  # three, with the results
            assert tuple(row.launches for row in recorder.rows) == expected

    def test_mixed_dtypes_are_not_launched_together(self):
        narrow = [torch.zeros(10, device="meta", dtype=torch.bfloat16) for _ in range(5)]
        with Recorder() as recorder:
            torch._foreach_add_(narrow, [t.float() for t in narrow])
        assert recorder.rows[-1].launches == 5

    def test_a_step_by_phase(self):
        found = {key: launches.count(ENTRIES[key].make(2, 200), TINY.model, torch.float32, 8) for key in (FULL, FROZEN, RANDOM)}
        linears = 7 * TINY.model.layers
        assert found[FULL].backward.launches - found[FROZEN].backward.launches == linears  # a weight gradient each
        assert found[RANDOM].forward.launches > found[FROZEN].forward.launches
        assert all(counts.total.reads == 0 for counts in found.values())
        assert found[FULL].total == Counts(*(sum(values) for values in zip(*found[FULL], strict=True)))
        assert found[FULL].zero_grad.launches == 0


class TestRoofline:
    def test_a_product(self):
        fast = Row("mm", "product", 1, 10**12, 10**6, torch.bfloat16, 4096)
        assert cards.seconds(fast, H200) == pytest.approx(1e12 / (0.95 * 790e12))
        assert cards.seconds(fast._replace(narrow=128), H200) == pytest.approx(1e12 / (0.6 * 790e12))
        assert cards.seconds(fast._replace(dtype=torch.float32), H200) == pytest.approx(1e12 / (0.95 * 53e12))
        assert cards.seconds(fast._replace(flops=1, nbytes=43 * 10**9), H200) == pytest.approx(1e-2)
        assert cards.seconds(fast._replace(flops=1, nbytes=1), H200) == FLOOR

    def test_pointwise(self):
        row = Row("add", "pointwise", 1, 0, 31 * 10**9)
        assert cards.seconds(row, H200) == pytest.approx(1e-2)
        assert cards.seconds(row, H200, compiled=True) == pytest.approx(FUSED * 1e-2)
        assert cards.seconds(Row("view", "free", 0), H200) == 0

    def test_the_slower_of_host_and_card_decides(self):
        row = Row("mm", "product", 1, 0, 43 * 10**9, torch.bfloat16, 4096)  # 10 ms
        short = row._replace(nbytes=1)
        assert cards.eager({"forward": [row] * 3}, H200, {"forward": 0.0}) == pytest.approx(3e-2 + LAUNCH + GAP)
        assert cards.eager({"forward": [short] * 3}, H200, {"forward": 3.0}) == pytest.approx(3.0 + 3 * LAUNCH + FLOOR)
        waits = Row("_local_scalar_dense", "free", 0, reads=True)
        with_read = cards.eager({"forward": [row, waits, short]}, H200, {"forward": 0.0})
        assert with_read == pytest.approx(LAUNCH + 1e-2 + LAUNCH + FLOOR)  # the second launch comes after the wait
        assert cards.graph({"forward": [row] * 3}, H200) == pytest.approx(3e-2 + 3 * GAP)

    def test_layers_are_extrapolated(self):
        recorded = {2: {"n": []}, 4: {"n": []}}
        assert roofline.extrapolated(recorded, 32, lambda _, n: 5.0 + 3 * n) == 5 + 3 * 32
        assert roofline.extrapolated(recorded, 4, lambda _, n: n) == 4

    def test_from_end_to_end(self):
        """The host's time is measured, and every regime and card is there."""
        workload = replace(TINY, model=replace(TINY.model, layers=5))
        found = roofline.run([workload], (FULL, FROZEN), 1)
        (row,) = found["rows"]
        assert row["methods"][FULL]["H200"]["eager"] >= row["methods"][FULL]["H200"]["graph"]
        assert row["methods"][FULL]["TFLOP"] > row["methods"][FROZEN]["TFLOP"]
        assert "not measured" in roofline.markdown(json.loads(json.dumps(found)))


class TestHost:
    def test_methods_take_turns(self):
        found = host.eager(TINY, (FULL, LORA_ONE), 2)
        assert all(len(seconds) == 2 and min(seconds) >= 0 for laps in found.values() for seconds in laps.values())
        assert LORA_ONE in host.eager_table(found)

    @pytest.mark.slow
    def test_a_failure_is_shown(self):
        found = host.compiled(replace(TINY, rank=0), (ADAPTER,), 1)
        assert "rank" in found[ADAPTER]["error"]
        assert "failed" in host.compiled_table(found)

    @pytest.mark.slow
    def test_compiled_models_are_timed(self):
        found = host.compiled(replace(TINY, model=replace(TINY.model, layers=1)), (FULL, RANDOM), 2)
        assert found[FULL]["graphs"] == 1
        assert found[RANDOM]["graphs"] >= 1
        assert FULL in host.compiled_table(found)


class TestSession:
    def test_it_goes_on_and_keeps_what_it_has(self, tmp_path):
        path = tmp_path / "latest.json"
        session = Session(path, 60.0, {"dry": True})

        def fails():
            assert json.loads(path.read_text())["parts"]["one"]["entries"] == [{"label": "good", "value": 1}]
            raise ValueError("no such thing")

        def endless():
            while True:
                try:
                    time.sleep(0.01)
                except Exception:  # noqa: BLE001, S112, RUF100
                    continue

        session.part("one", 30.0, [("good", lambda: {"value": 1}), ("bad", fails), ("good too", lambda: {"value": 2})])
        session.part("two", 0.2, [("endless", endless), ("late", dict)])
        found = json.loads(path.read_text())["parts"]
        assert [entry["label"] for entry in found["one"]["entries"]] == ["good", "good too"]
        assert found["one"]["failures"] == [{"label": "bad", "error": "ValueError: no such thing"}]
        assert "interrupted" in found["two"]["failures"][0]["error"]
        assert found["two"]["left out"] == ["late"]


class TestGpu:
    def test_the_plan_is_under_ten_minutes(self):
        assert BUDGETS.keys() == PARTS.keys()
        assert sum(BUDGETS.values()) < 600
        assert {workload.model.layers for workload in REAL.steps if workload.name.startswith("7B")} == {4}

    def test_without_cuda_it_says_so(self, monkeypatch):
        monkeypatch.setattr("sys.argv", ["gpu"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(LingradError, match="--dry"):
            gpu.main()

    @pytest.mark.slow
    def test_the_whole_script_at_tiny_sizes(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["gpu", "--dry", "--out", str(tmp_path / "out/cuda")])
        threads = torch.get_num_threads()
        try:
            gpu.main()
        finally:
            torch.set_num_threads(threads)
        found = json.loads((tmp_path / "out/cuda/latest.json").read_text())
        assert found["parts"].keys() == PARTS.keys()
        failed = [failure for part in found["parts"].values() for failure in part["failures"]]
        assert {failure["label"].rpartition(", ")[2] for failure in failed} <= {"captured"}  # CUDA graphs need CUDA
        assert all(part["entries"] for part in found["parts"].values())
        assert "mean nothing" in capsys.readouterr().out

        page = tmp_path / "performance.md"
        page.write_text("<!-- cuda:begin -->\n<!-- cuda:end -->\n")
        monkeypatch.setattr(report, "DOCS", page)
        monkeypatch.setattr(report, "OUT", tmp_path / "out")
        with pytest.raises(LingradError, match="make gpu"):
            docs.into_docs()
        (tmp_path / "out/cuda/latest.json").write_text(json.dumps(found | {"dry": False}))
        docs.into_docs()
        assert "tokens / s" in page.read_text()
