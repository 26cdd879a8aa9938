"""Break the package in one place at a time and see that tests notice: ``python tools/mutants.py``, ``make mutants``.

`mutants.toml` has the entries. Each names a function or class by its qualified name, so that it still applies when that moves
within its file; its text must stand in there exactly once.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SECONDS = 600  # for one run of pytest; a mutant that never ends is killed too


class Mutant(NamedTuple):
    """One change that must not go unnoticed.

    Args:
        name: The function or class it is in, such as ``lingrad.maps.kronecker.KroneckerMap.norm``.
        old: Text that is in it exactly once.
        new: What replaces it.
        breaks: What is wrong then.
        tests: The fewest tests that should notice.
    """

    name: str
    old: str
    new: str
    breaks: str
    tests: list[str]


def read(path: Path = ROOT / "tools" / "mutants.toml") -> list[Mutant]:
    """The entries."""
    return [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]


def locate(name: str, root: Path = ROOT) -> tuple[Path, int, int]:
    """Find a function or a class.

    Args:
        name: Its qualified name.
        root: The folder that holds the package.

    Returns:
        The file, and where in its text the definition begins and ends.

    Raises:
        LookupError: There is no such module, or no such definition in it.
    """
    parts = name.split(".")
    files = {i: root.joinpath(*parts[:i]).with_suffix(".py") for i in range(1, len(parts))}
    count = next((i for i, file in files.items() if file.is_file()), None)
    if count is None:
        raise LookupError(f"there is no module of {name}")
    path, rest = files[count], parts[count:]
    text = path.read_text()
    node: ast.AST = ast.parse(text)
    for part in rest:
        body = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        if not body:
            raise LookupError(f"{path.relative_to(root)} has no {'.'.join(rest)}")
        node = body[-1]  # of a property's setter, the setter
    lines = text.splitlines(keepends=True)
    return path, sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))


def mutated(mutant: Mutant, root: Path = ROOT) -> tuple[Path, str]:
    """The file a mutant changes, and its text then.

    Args:
        mutant: The mutant.
        root: The folder that holds the package.

    Returns:
        The path and the new text.

    Raises:
        LookupError: It no longer applies.
    """
    path, begin, end = locate(mutant.name, root)
    text = path.read_text()
    found = text[begin:end].count(mutant.old)
    if found != 1:
        raise LookupError(f"{mutant.name} has {found} times the text {mutant.old!r}; expected it once")
    return path, text[:begin] + text[begin:end].replace(mutant.old, mutant.new) + text[end:]


def stale(mutants: list[Mutant]) -> list[str]:
    """What no longer applies: a text that is not there, or a test that is gone."""
    wrong = []
    for mutant in mutants:
        try:
            mutated(mutant)
        except LookupError as error:
            wrong.append(str(error))
        for test in mutant.tests:
            file, *names = test.split("::")
            path = ROOT / file
            if not path.exists() or any(not re.search(rf"(def|class) {name}\b", path.read_text()) for name in names):
                wrong.append(f"{mutant.name}: there is no test {test}")
    return wrong


def copy_tree(folder: Path) -> None:
    """Copy what git tracks or would, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def environment(folder: Path) -> dict[str, str]:
    """Variables with which Python imports the copy, not the installed package."""
    # no bytecode: two mutants of one size, written within a second, would pass for each other
    return os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def noticed(folder: Path, tests: list[str]) -> str | None:
    """The first of the tests that fails in the copy; None when all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"the time limit of {SECONDS} s"
    if done.returncode == 0:
        return None
    if done.returncode > 2:  # not 1, a failure, nor 2, a package that cannot be imported
        sys.exit(f"pytest did not run {' '.join(tests)}: {(done.stdout + done.stderr).strip()[-300:]}")
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?|\S+)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    return found[1].removeprefix("tests/") if found else "a package that cannot be imported"


def main() -> None:
    """Try the mutants and print a table; exit with 1 where one survived or no longer applies."""
    parser = argparse.ArgumentParser(description="Break the package in one place at a time and see that tests notice.")
    parser.add_argument("--only", metavar="REGEX", default="", help="mutants whose name or description this finds")
    parser.add_argument("--list", action="store_true", help="list them and run nothing")
    parser.add_argument("--check", action="store_true", help="see that each still applies and its tests exist, and run nothing")
    options = parser.parse_args()
    chosen = [mutant for mutant in read() if re.search(options.only, f"{mutant.name}: {mutant.breaks}")]
    wrong = stale(chosen)
    if options.list:
        print("\n".join(f"{mutant.name}: {mutant.breaks}" for mutant in chosen))
    print("\n".join(f"no longer applies: {reason}" for reason in wrong), end="\n" if wrong else "")
    if options.list or options.check or wrong:
        sys.exit(bool(wrong))
    begin, survivors = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        failing = noticed(folder, sorted({test for mutant in chosen for test in mutant.tests}))
        if failing is not None:
            sys.exit(f"without a mutant the tests fail already: {failing}")
        for mutant in chosen:
            path, text = mutated(mutant, folder)
            whole = path.read_text()
            path.write_text(text)
            by = noticed(folder, mutant.tests)
            path.write_text(whole)
            survivors += by is None
            print(f"{mutant.name.removeprefix('lingrad.'):50}  {mutant.breaks:60}  {by or 'SURVIVED'}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survived; {time.monotonic() - begin:.0f} s")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
