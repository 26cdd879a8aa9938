"""The benchmarks: every method trains, every suite gives its figures, the docs show what a run wrote."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import docs, measure, merges, report, steps, traffic
from benchmarks.peers import split
from benchmarks.plan import ENTRIES, FROZEN, FULL, GOALS, MAIN, PLANS, SHARED, Plan, Steps, Workload, captured
from lingrad.errors import DependencyError, LingradError
from lingrad.models import LlamaShape

SMALL = Workload("small", LlamaShape(256, 32, 88, 2, 4, 16), 2, rank=8)
TINY = Plan("quick", (Steps(SMALL, MAIN),), (captured(32, 88, 4, 2, (0, 1, 2, 3), 8),), (), SMALL, SMALL, rounds=2)
NEEDS = {"pytorch_optimizer": "pytorch_optimizer", "apollo_torch": "apollo_torch"}  # key -> package of the extra bench
DOCS = Path(report.DOCS)


def trained(key):
    """A method's run after two steps, and what its parameters were before."""
    run = steps.MethodRun(key, SMALL, 2, "cpu")
    before = {name: p.detach().clone() for name, p in run.training.model.named_parameters()}
    for batch in steps.batches(SMALL, 2, "cpu"):
        run.step(batch)
    return run, before


@pytest.mark.parametrize("key", ENTRIES)
def test_every_method_trains_what_it_should(key):
    if key in NEEDS and find_spec(NEEDS[key]) is None:
        with pytest.raises(DependencyError, match=r"lingrad\[bench\]"):
            steps.MethodRun(key, SMALL, 2, "cpu")
        return
    run, before = trained(key)
    after = dict(run.training.model.named_parameters())
    changed = {name for name, p in before.items() if not torch.equal(p, after[name].detach())}
    linears = {name for name in after if "_proj" in name}
    rest = {name for name in after if "_proj" not in name}
    assert bool(changed & linears) == (key != FROZEN)
    assert bool(changed & rest) == (not key.startswith(("adapter", "lora")) or "all" in key)
    assert run.state_bytes() > 0


def test_low_rank_methods_project_the_same_weights():
    model = steps.MethodRun(FULL, SMALL, 2, "cpu").training.model
    projected, rest = split(model, 8)
    assert len(projected) == 14
    assert len(projected) + len(rest) == len(list(model.parameters()))


def test_goals_name_methods_and_plans_have_them():
    for plan in PLANS.values():
        for comparison in plan.steps:
            assert FULL in comparison.keys
            assert set(comparison.keys) <= ENTRIES.keys()
            assert comparison.blocks * comparison.ordinary - 1 >= 7  # rounds after the warm-up
    with pytest.raises(SystemExit):
        run_main("--plan", "nonsense")


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Of all suites but the one whose size is fixed; then the way into the docs."""
    suites = [suite for suite in benchmarks.SUITES if suite not in ("pca", "host", "compiled", "traffic")]  # minutes
    monkeypatch.setitem(benchmarks.PLANS, "quick", TINY)
    run_main("--quick", "--only", *suites, "--out", str(tmp_path / "out"))
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out/latest.json").read_text())
    assert report.markdown(found) == told == (tmp_path / "out/table.md").read_text()
    (kept,) = (tmp_path / "out/runs").glob("*.json")
    assert json.loads(kept.read_text()) == found
    assert found["machine"]["torch"] == torch.__version__
    assert {goal.figure for goal in GOALS} - found["figures"].keys() <= {"power/exact", "pca/autograd", "adapter, shared/lora"}
    assert found["figures"]["saved"] == pytest.approx(1.0)  # r / n of the plain layer, exactly
    assert 0.9 < found["figures"]["power energy"] < 1.1
    for timing in found["steps"]["small"]:
        assert len(timing["seconds"]) == 7
        assert timing["flops"] > 0
        assert timing["key"] in told
    work = {timing["key"]: timing["flops"] for timing in found["steps"]["small"]}
    assert work[FROZEN] < work[SHARED] < work["optimizer"] < work[FULL] == work["galore_torch"] - projections()
    assert (tmp_path / "out/steps-small.png").exists()
    assert (tmp_path / "out/refreshes.png").exists()

    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- cpu:begin -->\nold\n<!-- cpu:end -->\nafter\n")
    monkeypatch.setattr(report, "DOCS", page)
    monkeypatch.setattr(report, "OUT", tmp_path / "out")
    with pytest.raises(LingradError, match="whole runs"):
        docs.into_docs()
    whole = found | {"plan": "full", "figures": {goal.figure: 0.5 for goal in GOALS}}
    (tmp_path / "out/latest.json").write_text(json.dumps(whole))
    run_main("--docs")
    assert page.read_text() == f"before\n<!-- cpu:begin -->\n{report.markdown(whole)}<!-- cpu:end -->\nafter\n"
    assert json.loads((tmp_path / "performance/cpu/result.json").read_text()) == whole
    page.write_text("no marks")
    with pytest.raises(LingradError, match="cpu:begin"):
        docs.into_docs()


def projections():
    """What galore_torch multiplies beside full AdamW: 2 m n r to project and to lift, of every layer."""
    shapes = 4 * [(32, 32)] + 3 * [(88, 32)]
    return 2 * sum(2 * 2 * m * n * SMALL.rank for m, n in shapes)


def test_curves(tmp_path, monkeypatch, capsys):
    comparisons = [Steps(replace(SMALL, rank=rank), (FULL, SHARED)) for rank in (2, 4)]
    plan = replace(TINY, curves=(("rank", tuple(comparisons)),))
    monkeypatch.setitem(benchmarks.PLANS, "quick", plan)
    run_main("--quick", "--only", "curves", "--out", str(tmp_path))
    assert "Over rank" in capsys.readouterr().out
    assert (tmp_path / "curves.png").exists()


def test_merges_of_16_bit_weights(monkeypatch):
    """The errors of the ways are those of the weight's rounding; two parts of z differ from exact in fewer entries than one."""
    monkeypatch.setattr(merges, "MERGES", 3)
    rows = {row[3]: row[4:] for row in merges.merges(torch.bfloat16, 128, 16, "cpu")}
    assert rows.keys() == merges.WAYS.keys()
    for one, _, many, _, _ in rows.values():
        assert float(one) == pytest.approx(float(rows["exact"][0]), rel=0.02)
        assert float(many) == pytest.approx(float(rows["exact"][2]), rel=0.02)
    differing = [float(rows[way][3].rstrip("%")) for way in ("z in two parts", "fast")]
    assert differing[0] < differing[1] < 5


def test_no_results_no_docs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "OUT", tmp_path)
    with pytest.raises(LingradError, match="make bench"):
        docs.into_docs()


def test_ratios_are_paired():
    found = measure.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (found.middle, found.low, found.high) == (2.0, 1.0, 3.0)
    assert str(found) == "2.000 [1.000, 3.000]"


def test_traffic_counts_each_tensor_of_an_operator_once():
    x = torch.zeros(10, 10)
    with measure.Traffic() as moved:
        torch.add(x, x)
        x.t()
    assert moved.nbytes == 2 * 400


def test_what_is_sent_is_in_the_report(monkeypatch):
    step = {"reduce": 4000, "gather": 2000, "broadcast": 0}
    counted = [
        {"run": traffic.PLAIN, "steps": [step] * 4},
        {"run": "`random(rank=1)`, optimizer mode", "steps": [step | {"reduce": 1000}] * 3 + [step | {"broadcast": 500}]},
    ]
    monkeypatch.setattr(traffic, "compare", lambda: counted)
    found = benchmarks.run(TINY, ["traffic"], "cpu")
    about = {"plan": "tiny", "seconds": 1.0, "machine": report.machine("cpu")}
    told = report.markdown(found | about)
    assert "**Sent** by one of two processes in a step, fully_shard, in kB:" in told
    assert "1.0 (0.250) |      2.0 |                   4.0 |      2.0 |       0.5 |" in told


@pytest.mark.parametrize("path", sorted(DOCS.with_suffix("").glob("*/result.json")), ids=lambda path: path.parent.name)
def test_the_docs_show_their_results(path):
    found = json.loads(path.read_text())
    name = path.parent.name
    assert f"<!-- {name}:begin -->\n{docs.BLOCKS[name].markdown(found)}<!-- {name}:end -->" in DOCS.read_text()


def test_the_readme_tells_them():
    found = json.loads((DOCS.with_suffix("") / "cpu/result.json").read_text())["figures"]
    told = (
        f"{found['optimizer/full']:.2f} of full AdamW's on two CPU cores and "
        f"{found['optimizer/galore_torch']:.2f} of galore_torch's; in adapter mode it is {found['adapter/lora']:.2f} of PEFT's"
    )
    assert told in " ".join((DOCS.parents[1] / "README.md").read_text().split())


def run_main(*args):
    before, sys.argv = sys.argv, ["benchmarks", *args]
    try:
        benchmarks.main()
    finally:
        sys.argv = before
