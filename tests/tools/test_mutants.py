"""The mutants' runner; the mutants themselves are tried by ``make mutants``."""

import pytest

from tools import mutants


def test_every_mutant_still_applies():
    assert mutants.stale(mutants.read()) == []


@pytest.fixture
def package(tmp_path):
    (tmp_path / "lingrad").mkdir()
    path = tmp_path / "lingrad" / "maps.py"
    path.write_text("def norm(x):\n    return abs(x)\n\n\nclass Map:\n    def norm(self):\n        return abs(self.x)\n")
    return tmp_path


def test_a_mutant_changes_only_what_it_names(package):
    path, text = mutants.mutated(mutants.Mutant("lingrad.maps.Map.norm", "abs(", "(", "", []), package)
    assert text == path.read_text().replace("abs(self.x)", "(self.x)")


@pytest.mark.parametrize(
    ("name", "old", "message"),
    [
        ("lingrad.maps.Map.norm", "sqrt", "lingrad.maps.Map.norm has 0 times the text 'sqrt'; expected it once"),
        ("lingrad.maps.Map.lift", "abs", "lingrad/maps.py has no Map.lift"),
        ("lingrad.gone.Map", "abs", "there is no module of lingrad.gone.Map"),
    ],
)
def test_one_that_no_longer_applies_says_why(package, name, old, message):
    mutant = mutants.Mutant(name, old, "", "", [])
    with pytest.raises(LookupError, match=message):
        mutants.mutated(mutant, package)


def test_a_test_that_is_gone_is_named():
    mutant = mutants.read()[0]._replace(tests=["tests/maps/test_maps.py::test_gone", "tests/gone.py"])
    assert [reason.rpartition(": ")[2] for reason in mutants.stale([mutant])] == [
        "there is no test tests/maps/test_maps.py::test_gone",
        "there is no test tests/gone.py",
    ]
