"""Running a plan: trials in processes, some at a time; killed at any moment and started again, it goes on where it was."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from lingrad.console import Tick
from lingrad.errors import DataError, in_short
from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_json
from lingrad.research.host import Host
from lingrad.research.matching import matched
from lingrad.research.plan import ResearchPlan
from lingrad.research.progress import note, runs_done
from lingrad.research.pruning import Channel
from lingrad.research.record import RESULT, make_record, now
from lingrad.research.search import PATIENCE, Trials, open_storage
from lingrad.research.task import digests_of
from lingrad.research.trackers import check_trackers
from lingrad.research.ways import check_entry

PLAN = "plan.json"
CACHE = "cache"  # folder of what every run computes alike, in that of the results


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
        started: When it was started; None where it had ended before, and nobody noted it.
        channel: Where it asks whether to stop.
    """

    trials: Trials
    number: int
    job: Mapping[str, Any]
    out: Path
    process: Host
    errors: Path
    beat: float
    started: float | None
    channel: Channel


def execute(plan: ResearchPlan, out: Path, *, jobs: int = 1, storage: str | None = None, tick: Tick = lambda *_: None) -> None:
    """Make all trials and final runs of a plan that are not made yet.

    Args:
        plan: The plan.
        out: The folder of the results, made if missing; of one plan only.
        jobs: Processes at a time.
        storage: A database that several machines share, which then share the trials; None is a journal in ``out``.
        tick: Called after each run, with runs done, all of them, and a note.

    Raises:
        DataError: ``out`` is that of another plan, or the disk is full.
    """
    plan.task.check()
    check_trackers(plan.trackers)
    for entry in plan.entries:
        check_entry(entry, plan.folder, plan.of(entry).dtype)
    try:
        _claim(plan, out)
        plan.task.use_cache(out.absolute() / CACHE)  # for what is found out between the runs
        _execute(plan, out, open_storage(out, storage), jobs=jobs, alone=storage is None, tick=tick)
    except OSError as error:
        raise DataError(
            f"cannot write results to {out}: {error.strerror or error}; what has ended is kept: run it again"
        ) from error


def _execute(plan: ResearchPlan, out: Path, opened: Any, *, jobs: int, alone: bool, tick: Tick) -> None:
    """Do so; ``alone``: whether all records are in ``out``."""
    searches = [Trials(plan, entry, opened) for entry in plan.entries]
    finals: dict[str, Trials | None] = {}
    limits: dict[str, dict[str, Any]] = {}  # of the final runs of each entry, once they are known
    running: list[Running] = []
    hosts: list[Host] = []  # of the processes of trials, one for each that runs at a time
    total = len(plan.entries) * (plan.trials + len(plan.seeds))
    try:
        while True:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _ended(plan, one)
                done = runs_done(searches, finals)
                tick(done, total, note(plan, searches, finals, left=total - done, jobs=jobs))
            for one in running:
                one.channel.reply(partial(one.trials.stops, one.number))
                if time.time() - one.beat > PATIENCE / 4:
                    one.trials.beat(one.number)
                    one.beat = time.time()
            if len(running) == jobs:
                time.sleep(0.05)
                continue
            _settle(plan, searches, finals, limits, opened)
            work = [*searches, *(one for one in finals.values() if one is not None)]
            while len(running) < jobs:
                busy = {one.out for one in running}
                started = next(_takable(plan, out, work, limits, jobs, busy if alone else None, hosts), None)
                if started is None:
                    break
                running.append(started)
            if not running and len(finals) == len(plan.entries) and all(one is None or one.done for one in finals.values()):
                for left in out.glob("runs/*/.*"):  # of processes that were killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
                return
            time.sleep(0.05 if len(running) == jobs or plan.pruner != "none" else 0.5)
    finally:
        for host in hosts:
            host.close()


def _settle(
    plan: ResearchPlan, searches: list[Trials], finals: dict[str, Trials | None], limits: dict[str, Any], opened: Any
) -> None:
    """Begin the final runs of entries whose search has ended, and find what those that are matched keep to, once."""
    for search in searches:
        if search.entry.name not in finals and search.done:
            best = search.chosen(greater=plan.task.greater)
            values = {} if plan.trials == 0 else None if best is None else best.values
            finals[search.entry.name] = None if values is None else Trials(plan, search.entry, opened, values)
    for search in searches:
        if finals.get(search.entry.name) is not None and search.entry.name not in limits:
            found = matched(plan, search.entry, finals, search.seconds_of_a_step())
            limits |= {} if found is None else {search.entry.name: found}


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
    plan: ResearchPlan,
    out: Path,
    work: list[Trials],
    limits: Mapping[str, Any],
    jobs: int,
    busy: set[Path] | None,
    hosts: list[Host],
) -> Iterator[Running]:
    """Start trials that nobody runs, one by one, and those again whose record is gone; ``busy``: folders of those that run."""
    for trials in work:
        final = trials.best is not None
        kind = "final" if final else "search"
        if final and trials.entry.name not in limits:  # the entry that it is matched with has not ended
            continue
        own = limits[trials.entry.name] if final else {}
        found = trials.take()
        if found is None and busy is not None:
            ended = [(one.number, one.values, folder_of(out, trials.entry.name, kind, one.number)) for one in trials.outcomes()]
            found = next(((number, values) for number, values, path in ended if not path.exists() and path not in busy), None)
        if found is None:
            continue
        number, values = found
        folder = folder_of(out, trials.entry.name, kind, number)
        job = {
            "content": dict(plan.content), "where": PLAN, "folder": str(plan.folder), "quick": plan.quick,
            "entry": trials.entry.name, "values": {**values, **own.get("values", {})},
            "seed": plan.seeds[number] if final else plan.seed, "part": "final" if final else "tuning",
            "steps": own.get("steps"), "threads": _threads(jobs),
        }  # fmt: skip
        yield _start(trials, number, job, folder, hosts, out.absolute() / CACHE)


def _start(trials: Trials, number: int, job: Mapping[str, Any], folder: Path, hosts: list[Host], cache: Path) -> Running:
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = folder.parent / f".{folder.name}.{os.getpid()}.job.json"
    errors = asked.with_suffix(".err")
    write_whole(asked, json.dumps({**job, "cache": str(cache)}).encode())
    host = next((host for host in hosts if host.free), None)
    if host is None:
        hosts.append(host := Host())
    began, channel = time.time(), Channel(asked)
    channel.clear()
    if folder.exists():  # it had ended, and nobody noted it
        return Running(trials, number, job, folder, host, errors, began, None, channel)
    host.start(asked, folder, errors)
    return Running(trials, number, job, folder, host, errors, began, began, channel)


def _ended(plan: ResearchPlan, one: Running) -> None:
    """Note what became of a trial whose process has ended."""
    message = one.errors.read_text(errors="replace").strip()[-2000:] if one.errors.exists() else ""
    for file in (one.errors, one.errors.with_suffix(".json")):
        file.unlink(missing_ok=True)
    one.channel.clear()
    if not (one.out / RESULT).exists():
        code = one.process.returncode or 0
        if code == errno.ENOSPC:  # it is tried again by the next run
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        status = "killed" if code < 0 else "error"
        if code == -9:
            message = message or "killed by signal 9, perhaps because the machine's memory was full"
        record = make_record(one.job, {}, status=status, error=message or f"exit status {code}", created=now())
        one.out.mkdir(parents=True, exist_ok=True)
        write_whole(one.out / RESULT, (json.dumps(record, indent=1) + "\n").encode())
    record = read_json(one.out / RESULT)
    status = record["train_info"]["status"]
    info = record["train_info"]
    value = info["metrics"].get(plan.task.metric) if status == "success" else None
    measured = {key: info[key] for key in ("state_bytes", "train_time", "steps")}
    measured |= {} if one.started is None else {"took": time.time() - one.started}
    one.trials.finish(one.number, value, "" if value is not None else status, measured)


def _claim(plan: ResearchPlan, out: Path) -> None:
    """Make a folder that of a plan, or see that it is."""
    path, files = out / PLAN, digests_of(plan.task)
    if path.exists():
        known = read_claim(path)
        if known["digest"] != plan.digest or known["files"] not in (None, files):
            raise DataError(
                f"{out} holds the results of another plan, or of this one before its options, code or data were changed; "
                "name another one, --out FOLDER"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    kept = {"digest": plan.digest, "folder": str(plan.folder), "quick": plan.quick, "content": plan.content, "files": files}
    write_whole(path, (json.dumps(kept, indent=1) + "\n").encode())


def read_claim(path: Path) -> dict[str, Any]:
    """The plan whose results a folder holds.

    Args:
        path: The file that says so.

    Returns:
        ``digest``, ``folder``, ``quick`` and ``content``; and ``files``, what its task reads, None where that is not known.

    Raises:
        DataError: It is damaged.
    """
    try:
        kept = read_json(path)
        found = {key: kept[key] for key in ("digest", "folder", "quick", "content")}
        if [type(value) for value in found.values()] != [str, str, bool, dict]:
            why = "digest and folder must be texts, quick true or false, content a table"
            raise DataError(f"{path} is damaged ({why}); name another folder for the results")
        return {**found, "files": kept.get("files")}
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DataError(f"{path} is damaged ({in_short(error)}); name another folder for the results") from error


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)
