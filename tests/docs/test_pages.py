"""Pages that are generated are current; messages on the page of help are the library's; every page can be found."""

import importlib
import inspect
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from lingrad import optimizers
from lingrad.errors import LingradError
from tests.support.docs import matrix, reference
from tests.support.docs.pages import DOCS, blocks, run
from tests.support.docs.refusals import CASES

ROOT = DOCS.parent
site = SimpleNamespace(**runpy.run_path(str(ROOT / "tools/build_site.py")))
REMEDY = "make reference"


class TestReference:
    def test_the_pages_are_current(self):
        written = {path.name: path.read_text() for path in (DOCS / "reference").glob("*.md")}
        assert written == reference.pages(), REMEDY

    def test_every_public_name_is_on_a_page(self):
        pages = "".join((DOCS / "reference" / f"{path}.md").read_text() for path in reference.MODULES)
        found = 0
        for path in reference.MODULES:
            module = importlib.import_module(path)
            names = {n for n in vars(module) if not n.startswith("_") and _is_public(module, n)}
            for name in names | set(reference.LAZY.get(path, ())):  # test_the_pages_are_current compares the rest
                assert re.search(rf"(::: lingrad\.[\w.]*\b{name}$|^## `{name}`$)", pages, flags=re.MULTILINE), f"{path}.{name}"
                found += 1
        assert found > 100

    def test_a_package_with_public_names_is_listed(self):
        """Those that lingrad reaches by attribute; others are rooms of the engine."""
        assert {f"lingrad.{name}" for name in importlib.import_module("lingrad")._LAZY} <= set(reference.MODULES)

    def test_every_public_name_has_a_docstring(self):
        for path in reference.MODULES:
            module = importlib.import_module(path)
            for name in reference.public(module).keys() - reference.MADE.keys():
                thing = getattr(module, name)
                if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
                    assert inspect.getdoc(thing), f"{path}.{name}"


def _is_public(module, name):
    """Imported by an __init__ as itself, or defined here."""
    return name in reference.public(module)


class TestSupport:
    TEXT = (DOCS / "support.md").read_text()

    def section(self, name):
        return re.search(f"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", self.TEXT, flags=re.DOTALL)[1]

    def test_every_transform_and_base_has_a_row(self):
        rows = re.findall(r"^\| `([^`]+)` \|", self.section("transforms"), flags=re.MULTILINE)
        assert rows == matrix.transforms(), REMEDY
        assert re.findall(r"^\| `([^`]+)` \|", self.section("bases"), flags=re.MULTILINE) == optimizers.names(), REMEDY

    @pytest.mark.parametrize("row", ["full()", "rows(rank=2, every=2)"])
    def test_a_row_is_what_the_library_says_now(self, row):
        (line,) = (line for line in self.TEXT.splitlines() if line.startswith(f"| `{row}`"))
        found = matrix.table({f"`{row}`": (row, "adamw")}, matrix.Reasons()).splitlines()[2]
        assert re.sub(r"\(\d+\)", "", found) == re.sub(r"\(\d+\)", "", line), REMEDY

    @pytest.mark.slow
    def test_every_cell_is_what_the_library_says_now(self):
        for name, text in matrix.sections().items():
            assert self.section(name) == text, REMEDY


class TestHelp:
    @pytest.mark.parametrize("name", CASES)
    def test_a_message_is_what_the_library_says(self, name):
        if name == "four_bits_in_optimizer_mode":
            pytest.importorskip("bitsandbytes")
        if name == "galore_of_the_trainer":
            pytest.importorskip("transformers")
        page = (DOCS / "faq.md").read_text()
        (shown,) = re.findall(rf"<!-- {name} -->\n```text\n(.*?)\n```", page, flags=re.DOTALL)
        with pytest.raises(LingradError) as caught:
            CASES[name]()
        assert " ".join(shown.split()) == " ".join(str(caught.value).split())

    def test_every_message_has_a_case(self):
        assert set(re.findall(r"<!-- (\w+) -->\n```text", (DOCS / "faq.md").read_text())) == set(CASES)


def test_the_page_from_galore_runs():
    page = "from-galore.md"
    replaced, block = (block.replace("range(100)", "range(3)") for block in blocks(page))
    script = run(replaced, {}, page)
    names = run(block, {}, page)
    assert sorted(script["optimizer"].run.ranks().values()) == [16, 16]
    (state,) = {tuple(group) for group in [names["optimizer"].ranks().items()]}
    assert state == (("0.weight", 16), ("2.weight", 16))
    from lingrad.galore.names import SIDES

    page = (DOCS / "from-galore.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `proj_type="))
    theirs, ours = (re.findall(r"\w+", cell.replace("proj_type", "").replace("side", "")) for cell in row.split("|")[1:3])
    assert dict(zip(theirs, ours, strict=True)) == SIDES


class TestNavigation:
    def test_every_page_is_in_the_navigation(self):
        named = site.navigation()
        assert len(named) == len(set(named))
        assert set(named) == site.pages().keys(), "mkdocs.yml, nav"

    def test_what_belongs_to_an_item_is_indented_by_four(self):
        page = "- one\n  more\n\n  ```sh\n  make\n    deep\n  ```\n    - inner\ntext\n1. first\n   more\n10. tenth\n    more\n"
        assert site.indented(page) == (
            "- one\n    more\n\n    ```sh\n    make\n      deep\n    ```\n    - inner\ntext\n1. first\n    more\n"
            "10. tenth\n    more\n"
        )

    def test_code_outside_of_lists_is_left_alone(self):
        page = "- one\n\ntext\n```python\n- not an item\n  indented\n```\n"
        assert site.indented(page) == page

    def test_what_a_page_loads_from_elsewhere_is_found(self, tmp_path):
        page = (
            '<link rel="stylesheet" href="https://fonts.example/a.css"><script src="//cdn.example/b.js"></script>'
            '<a href="https://arxiv.org">a paper</a><img src="here.png"><link rel="icon" href="assets/logo.svg">'
        )
        (tmp_path / "page.html").write_text(page)
        assert list(site.outside(tmp_path)) == ["page.html: https://fonts.example/a.css", "page.html: //cdn.example/b.js"]


LONGEST = 60  # words of a paragraph


def paragraphs(text):
    """Paragraphs and items of lists; no code, tables, headings, comments."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\s*)[-*] ", r"\n\1", text, flags=re.MULTILINE)
    kept = (block.strip() for block in re.split(r"\n\s*\n", text))
    return [block for block in kept if block and block[0] not in "#|!<"]


def long_ones(text):
    return [block[:60] for block in paragraphs(text) if len(block.split()) > LONGEST]


class TestReadme:
    def test_a_paragraph_is_short(self):
        found = long_ones(Path(ROOT / "README.md").read_text())
        assert not found, f"more than {LONGEST} words: {found}"

    def test_long_paragraphs_are_found(self):
        short, long = "word " * 60, "word " * 61
        assert long_ones(f"# Title\n\n{short}\n\n- {short}\n- {short}\n\n```sh\n{long}\n```\n\n| {long} |\n") == []
        assert len(long_ones(f"{long}\n\n- {short}\n- {long}\n  {short}\n")) == 2


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_tables(page):
    """GitHub and the site show a table where the line below its head has a dash in each cell, and as many cells."""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        if not (line.startswith("|") and "-" in line and set(line) <= set("|-: ")):
            continue
        cells = line.strip()[1:-1].split("|")
        assert all(re.fullmatch(r" *:?-+:? *", cell) for cell in cells), f"line {number + 1}: {line}"
        head = lines[number - 1].replace("\\|", "").strip()[1:-1]
        assert head.count("|") == len(cells) - 1, f"line {number}: {lines[number - 1]}"
