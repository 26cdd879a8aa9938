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
from lingrad.research import processes
from lingrad.research.plan import make_plan
from lingrad.research.pruning import Channel
from lingrad.research.record import RESULT, make_record, now
from lingrad.research.search import PRUNED
from lingrad.research.trackers import tracked
from lingrad.research.training import DivergedError, train
from lingrad.research.ways import make_method

OUT_OF_MEMORY = "out of memory"
GRACE = 10.0  # seconds in which the first process writes its record where another one has failed


def run_job(job: Mapping[str, Any], out: Path, channel: Channel | None = None, cache: Path | None = None) -> dict[str, Any]:
    """Run a job and write its folder.

    Args:
        job: ``content``, ``where``, ``folder`` and ``quick`` of the plan; ``entry``, its name; ``values`` that are tried;
            ``seed``; ``part``, what it is judged by; ``steps``, or None for those of the plan; ``threads``; and, of a run that
            was stopped at a rung and is made again, ``stopped``, that rung.
        out: The folder, which must not exist.
        channel: Where to ask at rungs whether to stop; None is nowhere.
        cache: A folder for what every run of the plan computes alike; None is none.

    Returns:
        The record; of a process other than the first one, which writes nothing, what it would be.

    Raises:
        SystemExit: A process other than the first one has failed.
    """
    created, several = now(), _processes(job)
    torch.set_num_threads(max(1, job["threads"] // several))
    with processes.joined(job["content"].get("run", {}).get("device", "cpu")) as device:
        if processes.rank() > 0:
            try:
                return _run(job, None, created, device, None, cache)
            except Exception as error:  # torchrun ends all processes with this one; the first may have the same to record
                sys.stderr.write(f"process {processes.rank()}: {in_short(error)}\n")
                time.sleep(GRACE)
                raise SystemExit(1) from error
        with new_folder(out) as folder:
            record = _run(job, folder, created, device, channel, cache)
            (folder / RESULT).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _run(
    job: Mapping[str, Any], folder: Path | None, created: str, device: str, channel: Channel | None, cache: Path | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    status, error = "success", ""
    kept = job.get("stopped")
    verdict = (lambda rung, value: rung == kept) if channel is None else channel.ask
    try:
        plan = make_plan(job["content"], job["where"], Path(job["folder"]), quick=job["quick"])
        plan = plan if job["steps"] is None else replace(plan, steps=job["steps"], tokens=0)
        if cache is not None:
            plan.task.use_cache(cache)
        entry = plan.entry(job["entry"])
        method = make_method(entry, job["values"], seed=job["seed"], folder=plan.folder)
        plan = replace(plan.of(entry), device=device)
        name = f"{job['entry']}, seed {job['seed']}, {job['part']}"
        config = {"entry": job["entry"], "part": job["part"], "seed": job["seed"], **job["values"]}
        trackers = () if folder is None else plan.trackers
        with tracked(trackers, plan.folder, project=plan.name, run=name, config=config, out=folder or Path()) as log:
            found = train(plan, method, seed=job["seed"], part=job["part"], out=folder, log=log, verdict=verdict)
        if found["stopped"]:
            status, job = PRUNED, {**job, "stopped": found["stopped"]}
    except Exception as caught:  # a failure is a result
        status, error = kind_of(caught), in_short(caught)
        if folder is None or status == "disk full":
            raise
    return make_record(job, found, status=status, error=error, created=created)


def _processes(job: Mapping[str, Any]) -> int:
    found = job["content"].get("run", {}).get("processes", 1)
    return found if type(found) is int and found > 1 else 1


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
    """End this process where the one that it works for has ended, killed perhaps: nobody would take its result."""
    above = os.getppid()  # torchrun, where it has started this one

    def watch() -> None:
        while os.getppid() == above and (above == parent or _is_alive(parent)):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


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
        asked = content.get("run_info", {}).get("job", content)
        if (count := _processes(asked)) > 1 and not processes.is_launched():
            return processes.launch(job, out, count)
        cache = asked.pop("cache", None)  # of a job, which no record has
        channel = Channel(Path(job)) if parent and asked is content else None
        run_job(asked, Path(out), channel, None if cache is None else Path(cache))
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
    ended = main(*sys.argv[1:])
    if processes.is_launched():
        sys.stderr.flush()
        os._exit(ended)  # gloo's threads sometimes abort a process that ends in the ordinary way
    sys.exit(ended)
