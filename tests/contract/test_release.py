"""The files of a release agree with each other: versions, floors, addresses."""

import re
import sys
from pathlib import Path

import lingrad

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = ("docs", "dev", "mutants", "peers", "bench", "examples")  # extras for work on lingrad; the others are a user's


def numbers(version):
    """A version's numbers, without zeros at the end: 2.9 and 2.9.0 are the same."""
    return tuple(int(part) for part in re.sub(r"(\.0)+$", "", version).split("."))


def floors():
    """The lowest version that pyproject.toml allows of each package that a user may have, by name."""
    extras = PROJECT["optional-dependencies"]
    assert set(TOOLS) < extras.keys()
    asked = [*PROJECT["dependencies"], *(item for extra in extras.keys() - set(TOOLS) for item in extras[extra])]
    found = {}
    for item in asked:
        if not item.startswith("lingrad["):
            name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:;.*)?", item).groups()
            assert found.setdefault(name, numbers(version)) == numbers(version), f"{name} has two floors"
    return found


def constraints(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))


def test_the_lowest_versions_are_those_that_are_tested():
    assert {name: numbers(version) for name, version in constraints("constraints-lowest.txt").items()} == floors()


def test_no_floor_is_above_what_everything_is_measured_with():
    pinned = constraints("constraints.txt")
    for name, floor in floors().items():
        if name in pinned:
            assert tuple(int(part) for part in re.findall(r"\d+", pinned[name])[:3]) >= floor, name


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert PROJECT["version"] == lingrad.__version__ == cited
    assert f"## {lingrad.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_addresses_are_the_projects():
    home = PROJECT["urls"]["Homepage"]
    assert home == "https://github.com/lingrad/lingrad"
    assert all(address.startswith(home) for address in PROJECT["urls"].values())
    texts = [ROOT / "CITATION.cff", ROOT / "SECURITY.md", *(ROOT / ".github").rglob("*.yml")]
    for text in texts:
        for address in re.findall(r"https://github\.com/[\w./-]*", text.read_text()):
            assert address.startswith(home), text


def test_a_release_is_built_checked_and_attested():
    release = (ROOT / ".github/workflows/release.yml").read_text()
    assert release.index("make dist") < release.index("attest-build-provenance") < release.index("gh-action-pypi-publish")
    recipe = (ROOT / "Makefile").read_text().split("\ndist:")[1].split("\n\n")[0]
    for word in ("-m build", "twine check --strict", "check-wheel-contents", "tools/check_dist.py"):
        assert word in recipe
