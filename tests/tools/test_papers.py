"""The index of papers."""

import re
from pathlib import Path

import pytest

from lingrad.errors import DataError
from lingrad.memory import named
from tools import update_papers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text()


def test_the_page_has_the_table():
    assert f"<!-- papers:begin -->\n{update_papers.table()}<!-- papers:end -->" in PAGE  # python tools/update_papers.py


def test_every_name_is_in_it_with_its_paper():
    for written, paper in named.published().values():
        assert f"| `{written}` " in PAGE
        for number in re.findall(r"arXiv (\d{4}\.\d{5})", paper):
            assert f"[arXiv {number}](https://arxiv.org/abs/{number})" in PAGE


def test_a_name_without_an_entry_is_noticed(monkeypatch):
    monkeypatch.setitem(update_papers.ENTRIES, "no_such", update_papers.Entry("", "not tested", ""))
    monkeypatch.delitem(update_papers.ENTRIES, "galore")
    with pytest.raises(DataError, match="and the registries differ in galore, no_such; add or remove entries there"):
        update_papers.table()


def test_states_are_known_and_links_lead_somewhere():
    entries = [*update_papers.ENTRIES.values(), *(entry for *_, entry in update_papers.OTHERS)]
    assert {entry.state for entry in entries} <= set(update_papers.STATES)
    for target, anchor in re.findall(r"\]\((?!https)([^)#]+)(?:#([^)]+))?\)", PAGE):
        page = ROOT / "docs" / target
        assert page.is_file(), target
        titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in slugs, f"{target}#{anchor}"
    for path in re.findall(r"`(tests/[\w/.]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
