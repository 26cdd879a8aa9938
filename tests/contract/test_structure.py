"""What the structure of the package must stay within, measured by tools/structure.py; and that it measures it."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

tool = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "tools/structure.py")))


@pytest.fixture(scope="module")
def now():
    return tool.working_tree()


class TestLimits:
    def test_no_file_of_the_tests_is_too_long(self, now):
        assert now.too_long("tests") == []

    def test_units_import_in_one_direction(self, now):
        level = {name: i for i, names in enumerate(now.levels) for name in names}
        assert [(one, other) for one, other in sorted(now.edges) if level[one] <= level[other]] == []
        assert len(now.levels) <= 13

    def test_units_import_few_others(self, now):
        assert len(now.edges) < 185
        assert now.cycles == []

    def test_no_file_of_the_package_is_too_long(self, now):
        assert now.too_long("lingrad") == []

    def test_a_class_has_few_fields_and_a_class_name_one_meaning(self, now):
        assert 0 < len(now.fields("Subspace")) <= 10
        assert [cls.name for cls in now.chain("SubspaceOptimizer")] == ["SubspaceOptimizer"]
        assert now.repeated(classes=True) == {}

    def test_an_option_is_listed_in_three_places(self, now):
        assert len(now.option_lists) == 3

    def test_a_transform_writes_one_method(self, now):
        assert now.abstract("SideTransform") == ["basis"]


class TestMeasures:
    """Each on a tree of a few lines in which the answer is plain."""

    def test_a_unit_is_a_file_or_folder_at_the_top(self):
        tree = tool.Structure(
            {
                "lingrad/__init__.py": "from lingrad.api import wrap as wrap",
                "lingrad/api.py": "def wrap():\n    from lingrad.engine import step",
                "lingrad/engine/__init__.py": "",
                "lingrad/engine/step.py": "import torch\nfrom lingrad import errors\nfrom lingrad.engine import run",
                "lingrad/engine/run.py": "from lingrad.errors import SpecError",
                "lingrad/errors.py": "class SpecError(Exception): ...",
                "benchmarks/speed.py": "import lingrad.api",
                "tests/test_api.py": "import lingrad.engine.step",
            }
        )
        assert tree.top == (["__init__.py", "api.py", "errors.py"], ["engine"])
        assert sorted(tree.edges) == [
            ("benchmarks", "lingrad.api"),
            ("lingrad", "lingrad.api"),
            ("lingrad.api", "lingrad.engine"),
            ("lingrad.engine", "lingrad.errors"),
        ]
        assert tree.levels == [["lingrad.errors"], ["lingrad.engine"], ["lingrad.api"], ["benchmarks", "lingrad"]]
        assert tree.cycles == []

    @pytest.mark.parametrize("place", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
    def test_every_import_counts_in_a_cycle(self, place):
        back = place.format("from lingrad.maps.base import Map")
        tree = tool.Structure(
            {
                "lingrad/maps/base.py": "from lingrad.maps import kronecker",
                "lingrad/maps/kronecker.py": "import lingrad.tensors",
                "lingrad/maps/other.py": "from lingrad.maps import base",
                "lingrad/tensors.py": back,
            }
        )
        assert tree.cycles == [["lingrad.maps.base", "lingrad.maps.kronecker", "lingrad.tensors"]]
        assert tree.levels == [["lingrad.maps", "lingrad.tensors"]]

    def test_fields_are_all_that_an_object_holds(self):
        text = (
            "class Named:\n    name: str\n"
            "class Subspace(Named):\n    rank: int = 4\n    _map: Map | None = None\n    kinds: ClassVar[int] = 3\n"
            "    def __post_init__(self):\n        self.coords, self.rank = 0, 1\n        self.state['a'] = self.name"
        )
        assert tool.Structure({"lingrad/subspace.py": text}).fields("Subspace") == ["rank", "_map", "coords", "name"]

    def test_the_work_of_an_author_is_what_no_base_has_done(self):
        text = (
            "class Transform(ABC):\n    @abstractmethod\n    def init(self): ...\n    @abstractmethod\n    def map(self): ...\n"
            "class SideTransform(Transform):\n    def init(self): ...\n    @abc.abstractmethod\n    def basis(self): ...\n"
        )
        assert tool.Structure({"lingrad/side.py": text}).abstract("SideTransform") == ["map", "basis"]

    def test_a_list_of_options_names_six(self):
        six = ["scale", "carry", "seed", "share", "ledger", "compat"]
        text = (
            f"def wrap(model, {', '.join(six)}): ...\ndef adapt(*, {', '.join(six)}): ...\ndef few({', '.join(six[:5])}): ...\n"
            f"class Settings:\n    {'; '.join(f'_{name}: int' for name in six)}\n    def set(self):\n"
            f"        {'; '.join(f'self._{name} = 0' for name in six)}\n"
            f"saved = {dict.fromkeys(six)}\nnames = {tuple(six)}\nread = {six[:5]}\nwrap(model, {', '.join(six)})\n"
        )
        assert tool.Structure({"lingrad/api.py": text}).option_lists == [
            "lingrad.api:1 parameters of wrap",
            "lingrad.api:2 parameters of adapt",
            "lingrad.api:4 fields of Settings",
            "lingrad.api:6 attributes set by set",
            "lingrad.api:8 a literal",
            "lingrad.api:9 a literal",
        ]

    def test_a_name_has_two_meanings_where_two_modules_define_it(self):
        tree = tool.Structure(
            {
                "lingrad/a.py": (
                    "class Row: ...\ndef find(): ...\nKind = Literal['a']\n_Pair: TypeAlias = int\nDTYPES = {}\nclass One: ..."
                ),
                "lingrad/b.py": "class Row: ...\ndef find(): ...\nKind = int | str\n_Pair = tuple[int]\nDTYPES = {}\nx = f[0]",
                "lingrad/c.py": "from lingrad.a import One as One\ndef Row(): ...\nx = g[0]\ndef __getattr__(name): ...",
                "benchmarks/d.py": "class One: ...\ndef __getattr__(name): ...",
            }
        )
        assert tree.repeated() == {
            "Kind": ["lingrad.a", "lingrad.b"],
            "Row": ["lingrad.a", "lingrad.b", "lingrad.c"],
            "find": ["lingrad.a", "lingrad.b"],
        }
        assert list(tree.repeated(classes=True)) == ["Row"]
        assert sorted(tree.repeated(private=True)) == ["Kind", "Row", "_Pair", "find"]

    def test_a_file_may_have_as_many_lines_as_its_folder_allows(self):
        tree = tool.Structure(
            {"lingrad/a.py": "\n" * 300, "lingrad/b.py": "\n" * 301, "tests/a.py": "\n" * 500, "tests/b.py": "\n" * 501}
        )
        assert tree.too_long("lingrad") == ["lingrad/b.py"]
        assert tree.too_long("tests") == ["tests/b.py"]


def test_the_program_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["structure.py", "--list"])
    tool.main()
    table, _, lists = capsys.readouterr().out.partition("\n\n")
    assert table.startswith("| | working tree |\n|---|---|\n| files / folders at the top of lingrad/ | ")
    assert all(line.count("|") == 3 for line in table.splitlines())
    assert "\nedges between units:\n- " in lists
    assert "\n- lingrad.engine -> lingrad.adapters\n" in lists


def test_the_program_names_a_revision_that_it_cannot_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["structure.py", "no-such-revision"])
    with pytest.raises(SystemExit, match="git cannot read the revision 'no-such-revision'"):
        tool.main()
