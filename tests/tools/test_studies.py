"""The page of the studies shows what their published results say."""

from pathlib import Path

import pytest

from lingrad.research.plan import open_plan
from tools import studies

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/studies/index.md").read_text()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("file", studies.published(), ids=lambda file: file.stem)
def test_the_page_shows_their_tables(file):
    text, picture = studies.block(file)
    assert f"<!-- {file.stem}:begin -->\n{text}<!-- {file.stem}:end -->" in PAGE
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted((ROOT / "docs/studies/plans").glob("*.toml")), ids=lambda path: path.stem)
def test_every_plan_has_a_section_with_a_verdict(path):
    assert path.with_suffix(".json").name in {file.name for file in studies.published()}
    section = PAGE.split(f"<!-- {path.stem}:end -->")[1].split("\n## ")[0]
    assert "**Verdict.** " in section
    assert len(open_plan(path).seeds) >= 3
