"""The study of both modes over many steps: its figures, and what the page says of them."""

import json

import pytest
import torch

from tools import measure_trajectories as study


def test_the_page_has_the_figures():
    page, result = study.PAGE.read_text(), json.loads(study.RESULT.read_text())
    for name, block in study.blocks(result).items():
        assert f"<!-- {name}:begin -->\n{block}<!-- {name}:end -->" in page  # python tools/measure_trajectories.py --table
    assert all(
        result[key] == value for key, value in (("steps", study.STEPS), ("task", study.TASK), ("entries", study.ENTRIES))
    )
    assert all(run["gap"][-1][0] == run["control"][-1][0] == study.STEPS for run in result["runs"])


def test_a_verdict_is_of_the_largest():
    runs = [
        {"entry": name, "dtype": "float32", "gap": [(1, 0.0), (2, gap)], "control": [(2, control)]}
        for name, gap, control in (("a", 2e-5, 1e-5), ("b", 1e-5, 2e-6))
    ]
    found = study.blocks({"steps": 2, "tokens": 3, "torch": "2", "processor": "x", "runs": runs})
    assert "2.0e-05 in float32 (at most 5 times the control)" in found["verdict"]
    assert "float64" not in found["verdict"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found["gaps"].splitlines() if line.startswith("| ")]
    assert rows[-2:] == [["a", "", "2.0e-05 / 1.0e-05", ""], ["b", "", "1.0e-05 / 2.0e-06", ""]]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_short_run_has_both_gaps(monkeypatch, dtype):
    monkeypatch.setattr(study, "TASK", {**study.TASK, "steps": 4})
    run = study.measure(("svd", dtype))
    assert [step for step, _ in run["gap"]] == [step for step, _ in run["control"]] == [1, 2, 3, 4]
    # two modes, or two orders of the rows, differ by rounding: 1e-12 is the contract of docs/duality.md, in float32 the same
    # multiple of its eps is 5e-4
    limit = 1e-12 if dtype == "float64" else 5e-4
    assert 0 < max(gap for _, gap in run["control"]) < limit
    assert max(gap for _, gap in run["gap"]) < limit


def test_the_control_reverses_the_rows():
    batch = torch.arange(6).view(3, 2)
    assert torch.equal(study.RowOrderGap().batch(batch), torch.tensor([[4, 5], [2, 3], [0, 1]]))
