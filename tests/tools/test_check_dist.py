"""tools/check_dist.py: what a wheel and an sdist must hold, on archives made here; `make dist` runs it on the real ones."""

import runpy
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
tool = SimpleNamespace(**runpy.run_path(str(ROOT / "tools/check_dist.py")))


def archives(folder, without=(), extra=()):
    """A wheel and an sdist of a package of one module, without some files and with others."""
    package = folder / "lingrad"
    package.mkdir(parents=True)
    (package / "api.py").write_text("wrap = None\n")
    licences = [f"lingrad-0.1.0.dist-info/licenses/{name}" for name in tool.LICENCES]
    names = {name: name for name in ["lingrad/api.py", *tool.NEEDED, *licences]}
    names |= dict(extra)
    wheel, sdist = folder / "lingrad-0.1.0-py3-none-any.whl", folder / "lingrad-0.1.0.tar.gz"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in names.items():
            if name not in without:
                file.writestr(name, text)
    with tarfile.open(sdist, "w:gz") as file:
        for name in [*tool.SOURCES, *tool.NEEDED, *tool.LICENCES, *(name for name, _ in extra)]:
            if name not in without:
                file.addfile(tarfile.TarInfo(f"lingrad-0.1.0/{name}"))
    return wheel, sdist, package


def test_whole_archives_have_no_faults(tmp_path, capsys):
    wheel, sdist, package = archives(tmp_path)
    assert tool.faults_of_wheel(wheel, package) == []
    assert tool.faults_of_sdist(sdist) == []


@pytest.mark.parametrize(
    ("without", "extra", "faults"),
    [
        (["lingrad/api.py"], [], ["lingrad/api.py is missing"]),
        (["lingrad/research/data/moby-dick.txt.xz"], [], ["lingrad/research/data/moby-dick.txt.xz is missing"]),
        (["lingrad-0.1.0.dist-info/licenses/LICENSE"], [], ["the licence LICENSE is missing"]),
        ([], [("lingrad/notes.txt", "x")], ["lingrad/notes.txt should not be in it"]),
        ([], [("tests/test_api.py", "x")], ["tests should not be in it"]),
        (
            [],
            [("lingrad-0.1.0.dist-info/again", "lingrad/research/data/moby-dick.txt.xz")],
            ["lingrad-0.1.0.dist-info/again and lingrad/research/data/moby-dick.txt.xz are the same"],
        ),
    ],
)
def test_faults_of_a_wheel(tmp_path, without, extra, faults):
    wheel, _, package = archives(tmp_path, without, extra)
    assert tool.faults_of_wheel(wheel, package) == faults


def test_faults_of_an_sdist(tmp_path):
    _, sdist, _ = archives(tmp_path, ["tests/README.md"], [("runs/x", ""), ("lingrad/__pycache__/x.pyc", "")])
    assert tool.faults_of_sdist(sdist) == [
        "tests/README.md is missing",
        "runs/x should not be in it",
        "lingrad/__pycache__/x.pyc should not be in it",
    ]


def test_what_the_tool_looks_for_is_in_this_repository():
    for name in (*tool.NEEDED, *tool.LICENCES, *tool.SOURCES):
        assert (ROOT / name).is_file(), name
