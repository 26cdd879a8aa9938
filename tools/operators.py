"""Change single operators of the package, by cosmic-ray, and see that tests notice: ``make mutants-operators``.

It works in a copy of the tree, so that nothing is left changed when it is stopped. `operators.toml` says what and by which
tests.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import ROOT, copy_tree, environment, noticed, tomllib

SECONDS = 300  # for the tests of one mutant


def tool(folder: Path, name: str, *arguments: str) -> str:
    """Run a program of cosmic-ray in the copy; its output."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def prepare(folder: Path, session: str, module: str, tests: list[str], exclude: list[str]) -> list[str]:
    """Write a session of cosmic-ray for one module or package.

    Args:
        folder: The copy.
        session: Its name.
        module: The path of the module.
        tests: Which should notice.
        exclude: Regular expressions of operators to leave out.

    Returns:
        The mutants to try, by their number in the session.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "'not slow'", "-p", "no:cacheprovider", *tests]
    config = {
        "module-path": module,
        "timeout": SECONDS,
        "excluded-modules": ["**/__init__.py"],
        "test-command": " ".join(command),
    }
    text = "[cosmic-ray]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    text += f'distributor.name = "local"\nfilters.operators-filter.exclude-operators = {json.dumps(exclude)}\n'
    (folder / f"{session}.toml").write_text(text)
    tool(folder, "cosmic-ray", "init", f"{session}.toml", f"{session}.sqlite")
    tool(folder, "cr-filter-operators", f"{session}.sqlite", f"{session}.toml")
    return [item["job_id"] for item, result in dump(folder, session) if result is None]


def dump(folder: Path, session: str) -> list[tuple[dict, dict | None]]:
    """What a session holds: mutants and their results."""
    return [tuple(json.loads(line)) for line in tool(folder, "cosmic-ray", "dump", f"{session}.sqlite").splitlines()]


def skip(folder: Path, session: str, left_out: set[str]) -> None:
    """Mark mutants as not to be tried."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(folder / f"{session}.sqlite", WorkDB.Mode.open) as db:
        for job in left_out:
            db.set_result(job, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def main() -> None:
    """Try a sample, print the changes that no test noticed, and exit with 1 where there are any."""
    parser = argparse.ArgumentParser(description="Change single operators of the package and see that tests notice.")
    parser.add_argument(
        "--only", metavar="PATH", default="lingrad", help="a file or a folder, such as lingrad/maps/selection.py"
    )
    parser.add_argument("--sample", type=int, default=60, help="how many mutants; 0 for all: about six seconds each")
    parser.add_argument("--seed", type=int, default=0, help="which")
    options = parser.parse_args()
    config = tomllib.loads((ROOT / "tools" / "operators.toml").read_text())
    begin, survivors, tried = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        found: dict[str, list[str]] = {}
        for module, tests in config["tests"].items():
            inside = options.only.startswith(module)
            if inside or module.startswith(options.only):
                chosen = options.only if inside else module
                session = re.sub(r"\W", "-", chosen)
                found[session] = prepare(folder, session, chosen, tests, config["exclude"]["operators"])
                failing = noticed(folder, tests)
                if failing is not None:
                    sys.exit(f"without a mutant the tests fail already: {failing}")
        every = sorted((session, job) for session, jobs in found.items() for job in jobs)
        if not every:
            sys.exit(f"nothing to change in {options.only}; expected a path in {', '.join(config['tests'])}")
        taken = set(random.Random(options.seed).sample(every, min(options.sample or len(every), len(every))))  # noqa: S311
        print(f"{len(taken)} of {len(every)} mutants", flush=True)
        for session, jobs in found.items():
            skip(folder, session, {job for job in jobs if (session, job) not in taken})
            tool(folder, "cosmic-ray", "exec", f"{session}.toml", f"{session}.sqlite")
            results = [result for item, result in dump(folder, session) if (session, item["job_id"]) in taken and result]
            alive = [result["diff"] for result in results if result["test_outcome"] != "killed"]
            print("".join(f"SURVIVED\n{diff}\n" for diff in alive), end="", flush=True)
            tried, survivors = tried + len(results), survivors + len(alive)
    print(f"{tried} mutants, {survivors} survived; {time.monotonic() - begin:.0f} s")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
