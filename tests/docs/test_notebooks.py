"""examples/notebooks: their code runs, and says what the text around it says."""

import json
import re

import pytest

from tests.support.docs.pages import DOCS

FOLDER = DOCS.parent / "examples" / "notebooks"


def execute(name):
    """Run the code cells of a notebook, in order, in one namespace."""
    names = {}
    for number, cell in enumerate(json.loads((FOLDER / name).read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)  # noqa: S102 - our own text
    return names


def test_every_notebook_is_run_here():
    assert {path.name for path in FOLDER.iterdir()} == {"quickstart.ipynb", "duality.ipynb"}


def test_quickstart(capsys):
    pytest.importorskip("peft")
    names = execute("quickstart.ipynb")
    assert names["losses"][-1] < names["losses"][0]
    assert names["difference"] < 1e-4  # float32 rounding of W + B A against the merged weight
    assert "logits through PEFT differ by" in capsys.readouterr().out


def test_duality(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gaps = execute("duality.ipynb")["gaps"]
    # float64: the modes add up in another order, 1e-16 a step, amplified by the inverse of singular gaps
    assert max(gaps["adapter"] + gaps["switched at step 15"]) < 1e-12
    assert max(gaps["another basis"]) > 1e-2
    assert capsys.readouterr().out.count("relative difference") == 2


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert re.search(r'"nbformat": 4', path.read_text())
