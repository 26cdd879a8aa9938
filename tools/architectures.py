"""Try lingrad on every architecture of transformers, made tiny: ``make architectures``.

    python tools/architectures.py                   what has no result yet, then docs/architectures.md
    python tools/architectures.py --again faults    those again whose last result was an error or a wrong value
    python tools/architectures.py --only NAME ...   single classes; --docs: the page only, from docs/architectures.json

Results lie in runs/architectures, one file each, so that a run can be interrupted and resumed. Nothing is downloaded.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lingrad.console import markdown  # noqa: E402
from lingrad.files.atomic import write_whole  # noqa: E402
from tests.support.architectures.catalog import Architecture, catalog  # noqa: E402
from tests.support.architectures.checks import CHECKS, check  # noqa: E402
from tools.marks import put  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "architectures.md", ROOT / "docs" / "architectures.json"
FOLDER = ROOT / "runs" / "architectures"
SECONDS = 120  # of one architecture
FAULTS = ("error", "wrong")
Row = dict[str, Any]


def run_one(architecture: Architecture) -> Row:
    """Run the checks of one architecture in a process of its own, and write its result.

    Args:
        architecture: The architecture.

    Returns:
        The row.
    """
    path = FOLDER / f"{architecture.name}.json"
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as null:  # noqa: PTH123 - for its file descriptor
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        signal.alarm(SECONDS)
        row = check(architecture)
        write_whole(path, json.dumps(row).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != 0:
        ended = f"took more than {SECONDS} s" if os.WTERMSIG(status) == signal.SIGALRM else f"its process ended with {status}"
        write_whole(path, json.dumps(architecture._asdict() | {"reason": ended}).encode())
    row = json.loads(path.read_text())
    return row


def run_all(architectures: Sequence[Architecture], workers: int) -> None:
    """Run them, with a line for each.

    Args:
        architectures: What to run.
        workers: How many at a time.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    _preload()
    begin = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for done, row in enumerate(pool.imap_unordered(run_one, architectures), 1):
            seconds = time.perf_counter() - begin
            left = seconds / done * (len(architectures) - done)
            print(f"{done} of {len(architectures)}, {left / 60:.0f} min left  {row['name']}: {_short(row)}", flush=True)


def _preload() -> None:
    """Import once what every process needs."""
    import peft  # noqa: F401
    import transformers
    from transformers.models.bert import modeling_bert  # noqa: F401
    from transformers.models.clip import modeling_clip  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _short(row: Row) -> str:
    if "reason" in row:
        return f"not built here ({row['reason']})"
    return ", ".join(f"{name}: {state} {why[:100]}".strip() for name, (state, why) in row["checks"].items() if state != "works") or "works"


def main() -> None:
    """Run what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="classes to run, whether they have a result or not")
    parser.add_argument("--again", choices=("faults", "refused", "unbuilt", "all"), help="run these again")
    parser.add_argument("--docs", action="store_true", help="write the page only, from the recorded results")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    run_all([one for one in catalog() if wanted(one, options.only, options.again)], options.workers)


def wanted(architecture: Architecture, only: Sequence[str] | None, again: str | None) -> bool:
    """Whether an architecture is to be run."""
    path = FOLDER / f"{architecture.name}.json"
    if only is not None:
        return architecture.name in only
    if not path.exists() or again == "all":
        return True
    row = json.loads(path.read_text())
    states = {state for state, _ in row.get("checks", {}).values()}
    return {"faults": bool(states & set(FAULTS)), "refused": "refused" in states, "unbuilt": "reason" in row}.get(again or "", False)


if __name__ == "__main__":
    main()
