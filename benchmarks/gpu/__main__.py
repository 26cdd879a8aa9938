"""``python -m benchmarks.gpu``: what a machine with one GPU can say in ten minutes.

In order of importance: the tests that need a GPU, merges, launches, whole steps eager, compiled and captured, peak memory,
tokens a second. Each part has a time of its own; what fails is recorded, and the rest is measured. The results are written
after each figure, so that a run that is killed leaves what it has. ``make gpu ARGS=--docs`` puts them into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import docs, report
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.session import Session
from benchmarks.gpu.sizes import BUDGETS, DRY, REAL
from benchmarks.gpu.tables import markdown
from lingrad.errors import LingradError
from lingrad.files.atomic import write_whole


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="everything at tiny sizes on the CPU, to test the script")
    parser.add_argument("--docs", action="store_true", help="put the results into docs/performance.md as well")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="some parts")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/out/cuda by default")
    chosen = parser.parse_args()
    if not chosen.dry and not torch.cuda.is_available():
        raise LingradError(
            "there is no CUDA device here (torch.cuda.is_available() is False); --dry runs this script at tiny sizes on the CPU"
        )
    warnings.simplefilter("ignore")
    found = run(chosen.out or report.OUT / ("dry" if chosen.dry else "cuda"), chosen.only, 60 * chosen.minutes, dry=chosen.dry)
    sys.stdout.write(found)
    if chosen.docs:
        docs.into_docs()


def run(out: Path, only: list[str], seconds: float, *, dry: bool) -> str:
    """Measure some parts.

    Args:
        out: Folder of the results: ``latest.json`` and ``table.md``.
        only: The parts.
        seconds: For everything.
        dry: At tiny sizes on the CPU.

    Returns:
        The tables.
    """
    sizes = DRY if dry else REAL
    about = {"dry": dry, "machine": report.machine(sizes.device), "packages": [*report.PACKAGES, *EXTRA], "card": card()}
    about["machine"] |= {name: report.installed(name) for name in EXTRA}
    if dry:
        torch.set_num_threads(1)
        seconds = 3600.0  # so that a slow machine leaves nothing out
    session = Session(out / "latest.json", seconds, about)
    for name in only:
        share = BUDGETS[name] * seconds / sum(BUDGETS.values())
        items = PARTS[name](sizes, 0.95 * share) if name == "tests" else PARTS[name](sizes)
        session.part(name, share, items, share if name == "tests" else share / 2)
    text = markdown(json.loads(session.path.read_text()))
    write_whole(out / "table.md", text.encode())
    return text


EXTRA = ("bitsandbytes", "triton")


def card() -> dict[str, str | int]:
    """The GPU, its memory, its driver and CUDA's version; empty without one."""
    if not torch.cuda.is_available():
        return {}
    about = torch.cuda.get_device_properties(0)
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        driver = f"not known: {type(error).__name__}"
    return {
        "name": about.name,
        "memory": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "cuda": str(torch.version.cuda),
        "driver, power, clock": driver,
    }


if __name__ == "__main__":
    try:
        main()
    except LingradError as error:
        sys.exit(f"benchmarks.gpu: {error}")
