"""Measure how far both modes part over 500 steps, in three dtypes, and put the table into docs/studies/duality.md.

    python tools/measure_trajectories.py           make trajectories: four minutes on one core; goes on where it was stopped
    python tools/measure_trajectories.py --table   the table again, from docs/studies/duality.json

Each run is made three times from the same seed: in optimizer mode, in adapter mode, and in optimizer mode with the rows of each
batch in reverse order, which is the same mathematics with other rounding: the control. A difference beyond that of the control
would be the modes', one within it is that of any two ways to add up the same numbers.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lingrad.console import markdown
from lingrad.files.atomic import write_whole
from lingrad.research.diagnostics.modes import ModeGap, RowOrderGap
from lingrad.research.plan import make_plan
from lingrad.research.training import METRICS, train
from lingrad.research.ways import make_method

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.marks import put  # noqa: E402

RESULT, PAGE = ROOT / "docs" / "studies" / "duality.json", ROOT / "docs" / "studies" / "duality.md"
DTYPES = ("float64", "float32", "bfloat16")
STEPS, SEED = 500, 1
TASK = {"kind": "text", "steps": STEPS, "hidden": 32, "layers": 1, "rows": 4, "length": 16, "held": 16}
OPTIONS = {"lr": 5e-3, "base": "adamw"}
ENTRIES = [
    {"name": "svd", "method": "svd(rank=8, every=50)", "options": OPTIONS},
    {"name": "svd, rotated moments", "method": "svd(rank=8, every=50)", "options": {**OPTIONS, "carry": "rotate"}},
    {"name": "power", "method": "power(rank=8, every=50)", "options": OPTIONS},
    {"name": "random", "method": "random(rank=8, every=50)", "options": OPTIONS},
    {"name": "dct", "method": "dct(rank=8, every=50)", "options": OPTIONS},
    {
        "name": "svd, SGD with momentum",
        "method": "svd(rank=8, every=50)",
        "options": {"lr": 0.1, "base": "sgd", "momentum": 0.9},
    },
]


def measure(job: tuple[str, str]) -> dict[str, Any]:
    """Make one run with both others beside it.

    Args:
        job: The name of an entry, and the dtype.

    Returns:
        ``entry``, ``dtype``, ``loss`` at the end, ``gap`` and ``control``: (step, gap) each.
    """
    name, dtype = job
    torch.set_num_threads(1)
    run = {"dtype": dtype, "diagnostics": [ModeGap.name, RowOrderGap.name]}
    content = {"name": "duality", "task": TASK, "search": {"trials": 1}, "run": run, "entries": ENTRIES}
    plan = make_plan(content, "the study", ROOT)
    method = make_method(plan.entry(name), {}, seed=SEED, folder=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        found = train(plan, method, seed=SEED, part="final", out=Path(folder))
        lines = [json.loads(line) for line in (Path(folder) / METRICS).read_text().splitlines()]
    names = {"gap": ModeGap.name, "control": RowOrderGap.name}
    gaps = {key: [(line["step"], line[name]) for line in lines if name in line] for key, name in names.items()}
    return {"entry": name, "dtype": dtype, "loss": found["metrics"]["loss"], **gaps}


def blocks(result: Mapping[str, Any]) -> dict[str, str]:
    """What the page shows of a result.

    Args:
        result: What `main` has written.

    Returns:
        ``gaps``, a table: for each entry and dtype the gap of the modes at the end, and that of the control; and
        ``verdict``, what the figures support.
    """
    found = []
    for dtype in DTYPES:
        ends = [(run["gap"][-1][1], run["control"][-1][1]) for run in result["runs"] if run["dtype"] == dtype]
        if ends:
            largest, ratio = max(gap for gap, _ in ends), max(gap / control for gap, control in ends)
            found.append(f"{largest:.1e} in {dtype} (at most {ratio:.2g} times the control)")
    verdict = f"After {result['steps']} steps the largest gap of the two modes is {', '.join(found)}.\n"
    return {"gaps": _table(result), "verdict": verdict}


def _table(result: Mapping[str, Any]) -> str:
    cells = {(run["entry"], run["dtype"]): f"{run['gap'][-1][1]:.1e} / {run['control'][-1][1]:.1e}" for run in result["runs"]}
    names = dict.fromkeys(run["entry"] for run in result["runs"])
    rows = [("modes / control", *DTYPES), *((name, *(cells.get((name, dtype), "") for dtype in DTYPES)) for name in names)]
    machine = f"torch {result['torch']}, {result['processor']}"
    return markdown(rows) + f"\nAfter {result['steps']} steps of {result['tokens']} tokens; {machine}.\n"


def main() -> None:
    """Run what has no result yet, with progress on the terminal, and write the results and the page."""
    settings = {"steps": STEPS, "tokens": TASK["rows"] * TASK["length"], "seed": SEED, "task": TASK, "entries": ENTRIES}
    result = {**settings, "torch": torch.__version__, "processor": platform.machine(), "runs": list[dict[str, Any]]()}
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if all(before.get(key) == value for key, value in json.loads(json.dumps(settings)).items()):
        result = before
    made = {(run["entry"], run["dtype"]) for run in result["runs"]}
    jobs = [job for entry in ENTRIES for dtype in DTYPES if (job := (str(entry["name"]), dtype)) not in made]
    for done, job in enumerate(() if "--table" in sys.argv[1:] else jobs, 1):
        run = measure(job)
        result["runs"].append(run)
        print(f"{done} of {len(jobs)}: {', '.join(job)}: {run['gap'][-1][1]:.1e}, {run['control'][-1][1]:.1e}", flush=True)
        write_whole(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    put(PAGE, blocks(result))
    print(f"{PAGE.relative_to(ROOT)} now holds these figures")


if __name__ == "__main__":
    main()
