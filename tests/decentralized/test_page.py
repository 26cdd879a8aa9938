"""docs/decentralized.md: its program runs as it is printed."""

import lingrad
from tests.support.docs import pages

PAGE = "decentralized.md"


def test_the_program_runs(capsys):
    pages.run(pages.blocks(PAGE)[0], {"lingrad": lingrad}, PAGE)
    losses = eval(capsys.readouterr().out, {})  # noqa: S307 - what our own program prints
    assert len(losses) == 4
    assert all(0 < loss < 6 for loss in losses)
