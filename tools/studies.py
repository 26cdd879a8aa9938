"""Put the tables of the studies into docs/studies/index.md, from their published results: ``make studies``."""

import tempfile
from pathlib import Path

from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_json
from lingrad.research.bundle import unpack
from lingrad.research.pages import as_markdown
from lingrad.research.pictures import sensitivity
from lingrad.research.results import against, read_results, summarize
from tools.marks import put

VERSUS = {"residuals": "dropped"}  # of a study, the entry that others are compared with, where it is not the first
STUDIES = Path(__file__).parents[1] / "docs" / "studies"


def published() -> list[Path]:
    """The published results, one file for each plan that was run."""
    return sorted(path for path in STUDIES.glob("*.json") if (STUDIES / "plans" / f"{path.stem}.toml").exists())


def block(file: Path) -> tuple[str, bytes]:
    """The table of a study, and its picture.

    Args:
        file: Its published results, beside the folder ``plans``.

    Returns:
        Markdown, and a PNG of the trials' losses over the learning rate.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan, runs = read_results([unpack(file, Path(folder) / "results")], file.parent / "plans")
    plan = against(plan, VERSUS.get(file.stem, plan.entries[0].name))
    found = summarize(plan, runs)
    records = [run["record"]["run_info"] for run in read_json(file)["runs"].values()]
    commits = sorted({str(record["lingrad_git"].get("commit"))[:10] for record in records})
    text = as_markdown(plan, found).partition("\n")[2].strip()
    made = f"Made by `lingrad run docs/studies/plans/{file.stem}.toml`, revision {', '.join(commits)}; {len(runs)} runs."
    return f"{text}\n\n{made}\n", sensitivity(plan, found)


def main() -> None:
    """Fill the page."""
    blocks = {}
    for file in published():
        blocks[file.stem], picture = block(file)
        write_whole(STUDIES / f"{file.stem}.png", picture)
    put(STUDIES / "index.md", blocks)
    print(f"docs/studies/index.md holds {', '.join(blocks)}")


if __name__ == "__main__":
    main()
