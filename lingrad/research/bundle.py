"""All results of a plan in one file that can be published: nothing of it names a machine's folders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingrad.errors import DataError, in_short, require
from lingrad.files.atomic import new_folder, write_whole
from lingrad.files.reading import read_json
from lingrad.research.execution import PLAN, read_claim
from lingrad.research.record import RESULT, damaged, read_lines
from lingrad.research.training import METRICS

FORMAT = "lingrad results 1"
POINTS = 50  # of a curve that is kept
ABSOLUTE = re.compile(r'"((?:/|~|[A-Za-z]:)[^"]*)"')  # a path in a text of JSON
RUN = re.compile(r"runs/[a-z0-9-]+/(search|final)-[0-9]{3,}")


def pack(folders: Sequence[Path], file: Path) -> Path:
    """Write all results of a plan into one file of JSON.

    It holds the plan, the record of every run and the curves of the final runs, of which about `POINTS` lines are kept besides
    those that say more than a step's loss. `unpack` gives the folder back.

    Args:
        folders: The folders of the results; of several machines, all.
        file: The file; replaced if it exists.

    Returns:
        The file.

    Raises:
        DataError: A folder holds no results, those of another plan, or a damaged record; or the plan names a file by its
            place on this machine.
    """
    claims = [read_claim(folder / PLAN) for folder in folders]
    if len({claim["digest"] for claim in claims}) != 1:
        raise DataError("the folders hold the results of several plans; publish each by itself")
    place = ABSOLUTE.search(json.dumps(claims[0]["content"]))
    if place:
        why = f"the plan names '{place[1]}', a place on this machine"
        raise DataError(f"{why}; name files relative to the plan, and run it again")
    runs: dict[str, Any] = {}
    for folder in folders:
        places = {claims[0]["folder"], str(folder.absolute()), str(Path.home())} - {".", "/"}
        hidden = sorted(places, key=len, reverse=True)
        for path in sorted(folder.glob(f"runs/*/*/{RESULT}")):
            runs.setdefault(path.parent.relative_to(folder).as_posix(), _packed(path, hidden))
    if not runs:
        raise DataError(f"{folders[0]} holds no record of a run yet; `lingrad run` makes some")
    metas: list[Any] = []
    for run in runs.values():
        meta = run["record"].pop("meta_info")
        if meta not in metas:
            metas.append(meta)
        run["meta"] = metas.index(meta)
    head = {"format": FORMAT, "plan": {**claims[0], "folder": "."}, "meta_info": metas}
    lines = [f"{json.dumps(name)}: {json.dumps(run, separators=(',', ':'))}" for name, run in runs.items()]
    body = ",\n".join(lines)  # a line for each run, so that two versions can be compared
    return write_whole(file, f'{json.dumps(head)[:-1]}, "runs": {{\n{body}\n}}}}\n'.encode())


def unpack(file: Path, out: Path) -> Path:
    """Make the folder of results that `pack` read.

    Args:
        file: A file of `pack`.
        out: The folder, which must not exist.

    Returns:
        The folder.

    Raises:
        DataError: The file is none of `pack`, or damaged; or the folder exists.
    """
    try:
        content = read_json(file)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(
                f"{file} holds no published results ('format' is not '{FORMAT}'); `lingrad report --publish` makes some"
            )
        plan, metas = content["plan"], content["meta_info"]
        with new_folder(out) as folder:
            (folder / PLAN).write_text(json.dumps(plan, indent=1) + "\n")
            for name, run in content["runs"].items():
                require(bool(RUN.fullmatch(name)), "runs", f"'{name[:80]}' is no name of a run")
                (folder / name).mkdir(parents=True)
                record = {**run["record"], "meta_info": metas[run["meta"]]}
                record["run_info"]["job"] |= {"content": plan["content"], "folder": plan["folder"], "quick": plan["quick"]}
                (folder / name / RESULT).write_text(json.dumps(record, indent=1) + "\n")
                (folder / name / METRICS).write_text("".join(json.dumps(line) + "\n" for line in run["lines"]))
    except DataError:  # no fault of the file's content
        raise
    except OSError as error:
        raise DataError(f"cannot unpack {file} to {out}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"the published results {file} are damaged ({in_short(error)}); fetch them again") from error
    return out


def _packed(path: Path, hidden: Sequence[str]) -> dict[str, Any]:
    try:
        record = read_json(path)
        job = record["run_info"]["job"]
        for text in hidden:
            record["run_info"]["error_msg"] = record["run_info"]["error_msg"].replace(text, "...")
        for key in ("content", "folder", "quick"):
            job.pop(key)
        if "meta_info" not in record:
            raise KeyError("meta_info")
        final = job["part"] == "final"
        return {"record": record, "lines": _thinned(read_lines(path.parent / METRICS) if final else [])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise damaged(path, error) from error


def _thinned(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """About `POINTS` lines of a curve, and those that have more than most."""
    plain = min((len(line) for line in lines), default=0)
    every = max(1, len(lines) // POINTS)
    return [line for i, line in enumerate(lines) if i % every == 0 or i == len(lines) - 1 or len(line) > plain]
