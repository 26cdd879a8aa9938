"""Measure how far the modes part, over the tests' matrix, and put the tables into docs/duality.md: ``make duality``."""

import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lingrad.console import markdown

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from marks import put  # noqa: E402

from tests.support import breakers, cases  # noqa: E402 - the tests' own cases

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(job: tuple[cases.Case, str]) -> tuple[str, str, float, str]:
    """Run one case in one dtype: (base, dtype, gap, label)."""
    case, dtype = job
    torch.set_num_threads(1)
    return case.base, dtype, case.run(DTYPES[dtype]), case.label


def main() -> None:
    """Run everything, with progress on the terminal, and write the page."""
    pairs = cases.covering_cases(2)
    jobs = [(case, dtype) for dtype in DTYPES for case in pairs]
    worst: dict[str, dict[str, tuple[float, str]]] = defaultdict(dict)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for done, (base, dtype, gap, label) in enumerate(pool.map(measure, jobs, chunksize=4), 1):
            worst[base][dtype] = max(worst[base].get(dtype, (0.0, "")), (gap, label))
            if done % 40 == 0:
                print(f"{done} of {len(jobs)} runs", flush=True)
    rows = [[base, *(f"{worst[base][dtype][0]:.1e}" for dtype in DTYPES)] for base in sorted(worst)]
    rows = [[*row, f"`{worst[row[0]]['float64'][1]}`"] for row in rows]
    broken = [[what, f"{gap:.1e}"] for what, gap in breakers.measure()]
    blocks = {
        "gaps": f"{len(pairs)} combinations in each dtype.\n\n" + markdown([["base", *DTYPES, "the worst in float64"], *rows]),
        "breakers": markdown([["what breaks it", "difference"], *broken]),
    }
    page = ROOT / "docs" / "duality.md"
    put(page, blocks)
    print(f"{page.relative_to(ROOT)} now holds these figures")


if __name__ == "__main__":
    main()
