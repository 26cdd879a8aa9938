"""The files of a release agree with each other: versions, floors, addresses."""

import re
from pathlib import Path

import pytest

import lingrad

tomllib = pytest.importorskip("tomllib", reason="in Python from 3.11 on")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUN_TIME = ("hf", "trl", "bnb", "lion", "cli", "plot", "research", "torchft")  # extras that a user runs with


def floors():
    """The lowest version that pyproject.toml allows of each package, by name."""
    asked = [*PROJECT["dependencies"], *(item for extra in RUN_TIME for item in PROJECT["optional-dependencies"][extra])]
    found = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)(?:;.*)?", item).groups() for item in asked if not item.startswith("lingrad[")
    )
    return {name: tuple(map(int, version.split("."))) for name, version in found.items()}


def constraints(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))


def test_the_lowest_versions_are_those_that_are_tested():
    lowest = {name: tuple(map(int, version.split("."))) for name, version in constraints("constraints-lowest.txt").items()}
    asked = floors()
    assert asked.keys() <= lowest.keys()
    for name, floor in asked.items():
        assert lowest[name][: len(floor)] == floor, name
        assert not any(lowest[name][len(floor) :]), name


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
