"""See that a built wheel and sdist hold what they should, each file once: ``python tools/check_dist.py dist``."""

import sys
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

NEEDED = (
    "lingrad/py.typed",
    "lingrad/research/data/demo.toml",
    "lingrad/research/data/moby-dick.txt.xz",
    "lingrad/research/data/report.html",
)
LICENCES = ("LICENSE", "lingrad/research/data/NOTICE.md")
SOURCES = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "SECURITY.md",
    "Makefile",
    "constraints.txt",
    "tests/README.md",
    "docs/index.md",
)


def faults_of_wheel(path: Path, package: Path) -> list[str]:
    """What is wrong with a wheel.

    Args:
        path: The wheel.
        package: The folder of the package it was built from.

    Returns:
        One sentence for each fault.
    """
    found: list[str] = []
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        contents = {name: sha256(wheel.read(name)).hexdigest() for name in names if wheel.getinfo(name).file_size > 0}
    modules = {f"lingrad/{file.relative_to(package).as_posix()}" for file in package.rglob("*.py")}
    licences = {name.partition(".dist-info/licenses/")[2] for name in names} - {""}
    found += [f"{name} is missing" for name in sorted({*modules, *NEEDED} - set(names))]
    found += [f"the licence {name} is missing" for name in LICENCES if name not in licences]
    own = {name for name in names if name.startswith("lingrad/")}
    found += [f"{name} should not be in it" for name in sorted(own - modules - set(NEEDED))]
    others = {name.split("/")[0] for name in names} - {"lingrad"}
    found += [f"{name} should not be in it" for name in sorted(others) if not name.endswith(".dist-info")]
    seen: dict[str, str] = {}
    for name, digest in contents.items():
        if digest in seen and not name.endswith("__init__.py"):
            found.append(f"{name} and {seen[digest]} are the same")
        seen.setdefault(digest, name)
    return found


def faults_of_sdist(path: Path) -> list[str]:
    """What is wrong with an sdist.

    Args:
        path: The archive.

    Returns:
        One sentence for each fault.
    """
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    found = [f"{name} is missing" for name in (*SOURCES, *NEEDED, *LICENCES) if name not in names]
    odd = ("runs/", ".venv", "__pycache__", "dist/")
    return found + [f"{name} should not be in it" for name in names if any(part in f"{name}/" for part in odd)]


def main(folder: Path) -> int:
    """Check the newest wheel and sdist of a folder; returns the exit code."""
    package = Path(__file__).parents[1] / "lingrad"
    wheels, sdists = sorted(folder.glob("lingrad-*.whl")), sorted(folder.glob("lingrad-*.tar.gz"))
    if not wheels or not sdists:
        print(f"{folder} holds no wheel and sdist of lingrad: run make dist")
        return 1
    faults = [f"{wheels[-1].name}: {fault}" for fault in faults_of_wheel(wheels[-1], package)]
    faults += [f"{sdists[-1].name}: {fault}" for fault in faults_of_sdist(sdists[-1])]
    print("\n".join(faults) or f"{wheels[-1].name} and {sdists[-1].name} hold what they should")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
