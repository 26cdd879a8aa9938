"""docs/decentralized.md: its program runs as it is printed."""

import re
from pathlib import Path

import lingrad

PAGE = Path(__file__).parents[2] / "docs/decentralized.md"


def test_the_program_runs(capsys):
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]
    exec(compile(block, str(PAGE), "exec"), {"lingrad": lingrad})  # noqa: S102 - our own text
    losses = eval(capsys.readouterr().out, {})  # noqa: S307 - what our own program prints
    assert len(losses) == 4
    assert all(0 < loss < 6 for loss in losses)
