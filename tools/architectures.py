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
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch and transformers are imported
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lingrad.console import markdown  # noqa: E402
from lingrad.files.atomic import write_whole  # noqa: E402
from tests.support.architectures.catalog import Architecture, catalog  # noqa: E402
from tests.support.architectures.checks import CHECKS, RULES, STEPS, check  # noqa: E402
from tools.marks import put  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "architectures.md", ROOT / "docs" / "architectures.json"
FOLDER = ROOT / "runs" / "architectures"
SECONDS = 120  # of one architecture
FAULTS = ("error", "wrong")
STATES = {
    "works": "works",
    "refused": "refused in words",
    "skipped": "says nothing (note)",
    "error": "fault: another program's error",
    "wrong": "fault: wrong value",
}
Row = dict[str, Any]


class Worker:
    """A process that runs one architecture after the other, and is replaced where one takes too long or ends it."""

    def __init__(self) -> None:
        self.job: Architecture | None = None
        self.begin = 0.0
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.pipe), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, job: Architecture) -> None:
        """Give it something to run."""
        self.job, self.begin = job, time.perf_counter()
        self.pipe.send(job)

    def result(self) -> Row | None:
        """The row of what it runs, if it is done; where it cannot be, it is ended."""
        assert self.job is not None  # noqa: S101 - for type checkers
        if self.pipe.poll():
            try:
                row: Row = self.pipe.recv()
            except EOFError:
                self.process.join()
                return self.job._asdict() | {"reason": f"its process ended with {self.process.exitcode}"}
            return row
        if time.perf_counter() - self.begin > SECONDS:
            self.process.kill()
            self.process.join()
            return self.job._asdict() | {"reason": f"it took more than {SECONDS} s"}
        return None


def _serve(pipe: Connection, parents: Connection) -> None:
    parents.close()
    with open(os.devnull, "w") as null:  # noqa: PTH123 - for its file descriptor
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(check(job))


def run_all(architectures: Sequence[Architecture], workers: int) -> None:
    """Run them and write a file for each, with a line of progress.

    Args:
        architectures: What to run.
        workers: How many at a time.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    _preload()
    begin, todo, done = time.perf_counter(), list(architectures), 0
    busy: list[Worker] = []
    idle = [Worker() for _ in range(min(workers, len(todo)))]
    while todo or busy:
        while todo and idle:
            busy.append(idle.pop())
            busy[-1].start(todo.pop(0))
        wait([worker.pipe for worker in busy], timeout=1)
        for worker in list(busy):
            row = worker.result()
            if row is None:
                continue
            busy.remove(worker)
            idle.append(worker if worker.process.is_alive() else Worker())
            write_whole(FOLDER / f"{row['name']}.json", json.dumps(row).encode())
            done += 1
            left = (time.perf_counter() - begin) / done * (len(architectures) - done) / 60
            print(f"{done} of {len(architectures)}, {left:.0f} min left  {row['name']}: {_short(row)}", flush=True)


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
    return (
        ", ".join(f"{name}: {state} {why[:100]}".strip() for name, (state, why) in row["checks"].items() if state != "works")
        or "works"
    )


# What differs between messages that say the same: what is quoted, dotted, has digits, or is the name of a class.
_NAMES = re.compile(r"'[^']*'|\S*[\d.]\S*|\b\w*[a-z0-9][A-Z]\w*\b(?<!Error)")


class Notes:
    """Numbered reasons; those that differ in names and numbers only share one."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, str]] = {}
        self._counts: Counter[str] = Counter()

    def number(self, state: str, why: str) -> int:
        """The number of a reason."""
        key = f"{state} {re.sub(_NAMES, '', why)[:90]}"
        self._counts[key] += 1
        return self._known.setdefault(key, (len(self._known) + 1, why))[0]

    def lines(self) -> list[str]:
        """A line for each, with its first text, and how many cells of the tables name it."""
        return [f"{n}. {_plain(why)} ({self._counts[key]} x)" for key, (n, why) in self._known.items()]


def page(rows: Sequence[Row]) -> str:
    """The summary and the tables of the page.

    Args:
        rows: The results.

    Returns:
        Markdown.
    """
    import transformers

    notes, lines = (
        Notes(),
        [f"transformers {transformers.__version__}, torch {torch.__version__}; `{RULES}` with adamw, {STEPS} steps.", ""],
    )
    built = [row for row in rows if "checks" in row]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    summary = [["", "classes", "built here", *CHECKS]]
    for kind in [*kinds, "all"]:
        of_kind = [row for row in rows if kind in (row["kind"], "all")]
        mine = [row for row in of_kind if "checks" in row]
        cells = [sum(row["checks"][name][0] == "works" for row in mine) for name in CHECKS]
        summary.append([kind, *map(str, (len(of_kind), len(mine), *cells))])
    faults = [
        [what, *(str(sum(row["checks"][name][0] == state for row in built)) for name in CHECKS)]
        for state, what in STATES.items()
    ]
    lines += [markdown(summary), markdown([["built here", *CHECKS], *faults])]
    exported = [row for row in built if row["checks"]["export"][0] == "works"]
    made = sum(bool(row.get("inputs_made")) for row in exported)
    lines += [f"Of the {len(exported)} exports that work, {made} were compared on inputs that lingrad made by itself.", ""]
    for kind in kinds:
        mine = [row for row in built if row["kind"] == kind]
        good = [row["name"] for row in mine if _works(row)]
        lines += [f"### {kind}", "", f"All of it works for {len(good)}: {', '.join(good)}.", ""]
        table = [["class", *CHECKS]]
        table += [[row["name"], *(_cell(row["checks"][name], notes) for name in CHECKS)] for row in mine if not _works(row)]
        lines += [markdown(table)] if len(table) > 1 else []
    lines += ["### Notes", "", *notes.lines(), "", "### Not built here", ""]
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if "reason" in row:
            reasons[re.sub(r"NotBuiltError: [\d,]+ elements.*", "more elements than are tried here", row["reason"])].append(
                row["name"]
            )
    lines += [
        f"- {', '.join(names)}: {_plain(reason)}" for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(lines) + "\n"


def _works(row: Row) -> bool:
    return all(state == "works" for state, _ in row["checks"].values())


def _cell(outcome: Sequence[str], notes: Notes) -> str:
    state, why = outcome
    return {"works": "yes"}.get(state) or f"{state} {notes.number(state, why)}"


def _plain(text: str) -> str:
    """In one line, with nothing that Markdown or a test of links would read."""
    short = text if len(text) <= 220 else f"{text[:220]} ..."
    return "".join(f"\\{c}" if c in "<>*_[]|`" else c for c in short)


def main() -> None:
    """Run what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="classes to run, whether they have a result or not")
    parser.add_argument("--again", choices=("faults", "refused", "unbuilt", "all"), help="run these again")
    parser.add_argument("--docs", action="store_true", help="write the page only, from the recorded results")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    known = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    architectures = catalog()
    if not options.docs:
        run_all([one for one in architectures if wanted(one, options.only, options.again)], options.workers)
        known |= {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
        rows = [known[one.name] for one in architectures if one.name in known]
        write_whole(RESULTS, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())
    put(PAGE, {"architectures": page(json.loads(RESULTS.read_text()))})
    print(f"{PAGE.relative_to(ROOT)} now holds the results")


def wanted(architecture: Architecture, only: Sequence[str] | None, again: str | None) -> bool:
    """Whether an architecture is to be run.

    Args:
        architecture: The architecture.
        only: The names given, if any are.
        again: Which results are not enough.

    Returns:
        Whether it is.
    """
    path = FOLDER / f"{architecture.name}.json"
    if only is not None:
        return architecture.name in only
    if not path.exists() or again == "all":
        return True
    row = json.loads(path.read_text())
    states = {state for state, _ in row.get("checks", {}).values()}
    return {"faults": bool(states & set(FAULTS)), "refused": "refused" in states, "unbuilt": "reason" in row}.get(
        again or "", False
    )


if __name__ == "__main__":
    main()
