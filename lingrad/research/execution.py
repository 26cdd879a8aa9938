"""Running a plan: trials in processes, some at a time; killed at any moment and started again, it goes on where it was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from lingrad.console import Tick
from lingrad.errors import DataError
from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_json
from lingrad.research.matching import matched
from lingrad.research.plan import PlanEntry, ResearchPlan
from lingrad.research.record import RESULT, make_record, now
from lingrad.research.search import PATIENCE, Trials, open_storage
from lingrad.research.ways import check_entry

PLAN = "plan.json"


@dataclass
class Running:
    """A trial in its process.

    Args:
        trials: Where it comes from.
        number: Its number.
        job: What it does.
        out: Its folder, which appears when it has ended.
        process: The process.
        errors: Where its messages go.
        beat: When it gave the last sign of life.
    """

    trials: Trials
    number: int
    job: Mapping[str, Any]
    out: Path
    process: subprocess.Popen[bytes]
    errors: Path
    beat: float


def execute(
    plan: ResearchPlan,
    out: Path,
    *,
    jobs: int = 1,
    storage: str | None = None,
    quick: bool = False,
    tick: Tick = lambda *_: None,
) -> None:
    """Make all trials and final runs of a plan that are not made yet.

    Args:
        plan: The plan.
        out: The folder of the results, made if missing; of one plan only.
        jobs: Processes at a time.
        storage: A database that several machines share, which then share the trials; None is a journal in ``out``.
        quick: Whether the plan was cut down by ``quick``.
        tick: Called after each run, with runs done, all of them, and a note.

    Raises:
        DataError: ``out`` is that of another plan, or the disk is full.
    """
    for entry in plan.entries:
        check_entry(entry, plan.folder)
    _claim(plan, out, quick=quick)
    opened = open_storage(out, storage)
    searches = [Trials(plan, entry, opened) for entry in plan.entries]
    finals: dict[str, Trials | None] = {}
    running: list[Running] = []
    total = len(plan.entries) * (plan.trials + len(plan.seeds))
    try:
        while True:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _ended(plan, one)
                tick(_done(searches, finals), total, _note(plan, searches))
            for one in running:
                if time.time() - one.beat > PATIENCE / 4:
                    one.trials.beat(one.number)
                    one.beat = time.time()
            for search in searches:
                if search.entry.name not in finals and search.done:
                    best = search.chosen(greater=plan.task.greater)
                    finals[search.entry.name] = None if best is None else Trials(plan, search.entry, opened, best.values)
            work = [*searches, *(one for one in finals.values() if one is not None)]
            while len(running) < jobs:
                started = next(_takable(plan, out, work, finals, jobs, quick=quick), None)
                if started is None:
                    break
                running.append(started)
            if not running and len(finals) == len(plan.entries) and all(one is None or one.done for one in finals.values()):
                return
            time.sleep(0.05 if running else 0.5)
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()


def folder_of(out: Path, entry: str, kind: str, number: int) -> Path:
    """Where a run's record is.

    Args:
        out: The folder of the results.
        entry: The entry's name.
        kind: ``search`` or ``final``.
        number: The trial's number.

    Returns:
        The folder.
    """
    plain = re.sub(r"[^A-Za-z0-9]+", "-", entry).strip("-").lower()[:40]
    return out / "runs" / f"{plain}-{crc32(entry.encode()):08x}" / f"{kind}-{number:03d}"


def _takable(
    plan: ResearchPlan, out: Path, work: list[Trials], finals: Mapping[str, Trials | None], jobs: int, *, quick: bool
) -> Iterator[Running]:
    """Start trials that nobody runs, one by one."""
    for trials in work:
        final = trials.best is not None
        limits = matched(plan, trials.entry, finals) if final else {}
        if limits is None:  # the entry that it is matched with has not ended
            continue
        found = trials.take()
        if found is None:
            continue
        number, values = found
        folder = folder_of(out, trials.entry.name, "final" if final else "search", number)
        job = {
            "content": dict(plan.content), "where": PLAN, "folder": str(plan.folder), "quick": quick,
            "entry": trials.entry.name, "values": {**values, **limits.get("values", {})},
            "seed": plan.seeds[number] if final else plan.seed, "part": "final" if final else "tuning",
            "seconds": limits.get("seconds"), "threads": _threads(jobs),
        }  # fmt: skip
        yield _start(trials, number, job, folder)


def _start(trials: Trials, number: int, job: Mapping[str, Any], folder: Path) -> Running:
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = folder.parent / f".{folder.name}.{os.getpid()}.job.json"
    errors = asked.with_suffix(".err")
    write_whole(asked, json.dumps(job).encode())
    words = ["-m", "lingrad.research.trial", str(asked), str(folder), str(os.getpid())]
    if folder.exists():  # it had ended, and nobody noted it
        words = ["-c", ""]
    with errors.open("wb") as file:
        command = [sys.executable, *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)  # noqa: S603
    return Running(trials, number, job, folder, process, errors, time.time())


def _ended(plan: ResearchPlan, one: Running) -> None:
    """Note what became of a trial whose process has ended."""
    message = one.errors.read_text(errors="replace").strip()[-2000:] if one.errors.exists() else ""
    for file in (one.errors, one.errors.with_suffix(".json")):
        file.unlink(missing_ok=True)
    if not (one.out / RESULT).exists():
        code = one.process.returncode
        status = "disk full" if code == 28 else "killed" if code < 0 else "error"
        if code == -9:
            message = message or "killed by signal 9, perhaps because the machine's memory was full"
        record = make_record(one.job, {}, status=status, error=message or f"exit status {code}", created=now())
        one.out.mkdir(parents=True, exist_ok=True)
        write_whole(one.out / RESULT, (json.dumps(record, indent=1) + "\n").encode())
    record = read_json(one.out / RESULT)
    status = record["train_info"]["status"]
    info = record["train_info"]
    value = info["metrics"].get(plan.task.metric) if status == "success" else None
    measured = {key: info[key] for key in ("state_bytes", "train_time")}
    one.trials.finish(one.number, value, "" if value is not None else status, measured)


def _claim(plan: ResearchPlan, out: Path, *, quick: bool) -> None:
    """Make a folder that of a plan, or see that it is."""
    path = out / PLAN
    if path.exists():
        if read_json(path).get("digest") != plan.digest:
            raise DataError(
                f"{out} holds the results of another plan, or of this one before it was changed; name another folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    content = {"digest": plan.digest, "name": plan.name, "folder": str(plan.folder), "quick": quick, "content": plan.content}
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def _done(searches: list[Trials], finals: Mapping[str, Trials | None]) -> int:
    return sum(len(trials.outcomes()) for trials in (*searches, *finals.values()) if trials is not None)


def _note(plan: ResearchPlan, searches: list[Trials]) -> str:
    """The best so far."""
    found: list[tuple[float, PlanEntry]] = []
    for search in searches:
        best = search.chosen(greater=plan.task.greater)
        if best is not None and best.value is not None:
            found.append((best.value, search.entry))
    if not found:
        return "no trial has a value yet"
    value, entry = (max if plan.task.greater else min)(found, key=lambda pair: pair[0])
    return f"best {plan.task.metric} so far {value:.4g} ({entry.name})"
