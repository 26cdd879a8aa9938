"""One run of a plan in a process of its own: ``python -m lingrad.research.trial JOB.json FOLDER``.

JOB.json is a job, or the record of a run, which is then run again. FOLDER must not exist; it appears, whole, when the run has
ended, whether it failed or not, and holds the record and a line for every step.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lingrad.errors import DataError, LingradError, in_short
from lingrad.files.atomic import new_folder
from lingrad.files.reading import read_json
from lingrad.research.plan import make_plan
from lingrad.research.record import RESULT, make_record, now
from lingrad.research.training import DivergedError, train
from lingrad.research.ways import make_method

OUT_OF_MEMORY = "out of memory"


def run_job(job: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Run a job and write its folder.

    Args:
        job: ``content``, ``where``, ``folder`` and ``quick`` of the plan; ``entry``, its name; ``values`` that are tried;
            ``seed``; ``part``, what it is judged by; ``steps``, or None for those of the plan; ``threads``.
        out: The folder, which must not exist.

    Returns:
        The record.
    """
    created = now()
    torch.set_num_threads(job["threads"])
    with new_folder(out) as folder:
        found: dict[str, Any] = {}
        status, error = "success", ""
        try:
            plan = make_plan(job["content"], job["where"], Path(job["folder"]), quick=job["quick"])
            plan = plan if job["steps"] is None else replace(plan, steps=job["steps"], tokens=0)
            method = make_method(plan.entry(job["entry"]), job["values"], seed=job["seed"], folder=plan.folder)
            found = train(plan, method, seed=job["seed"], part=job["part"], out=folder)
        except Exception as caught:  # a failure is a result
            status, error = kind_of(caught), in_short(caught)
            if status == "disk full":
                raise
        record = make_record(job, found, status=status, error=error, created=created)
        (folder / RESULT).write_text(json.dumps(record, indent=1) + "\n")
    return record


def kind_of(error: BaseException) -> str:
    """What kind of failure an error is.

    Args:
        error: The error.

    Returns:
        ``diverged``, ``out of memory``, ``disk full``, ``error``.
    """
    if isinstance(error, DivergedError) or (isinstance(error, LingradError) and "not finite" in str(error)):
        return "diverged"
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    return "disk full" if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else "error"


def _end_with(parent: int) -> None:
    """End this process where the one that started it has ended, killed perhaps: nobody would take its result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(job: str, out: str, parent: str = "") -> int:
    """Run a job.

    Args:
        job: The file.
        out: The folder.
        parent: The process whose end ends this one.

    Returns:
        The exit status: 0 where a record was written, whatever it says.
    """
    if parent:
        _end_with(int(parent))
    try:
        content = read_json(Path(job))
        run_job(content.get("run_info", {}).get("job", content), Path(out))
    except (OSError, DataError) as error:
        sys.stderr.write(f"lingrad: {error}\n")
        return errno.ENOSPC if kind_of(error) == "disk full" else 2
    except (ValueError, KeyError, AttributeError) as error:
        sys.stderr.write(f"lingrad: {job} is neither a job nor the record of a run: {in_short(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m lingrad.research.trial RESULT.json FOLDER")
    sys.exit(main(*sys.argv[1:]))
