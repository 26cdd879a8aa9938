"""The pictures of a report draw what was measured, at the steps at which it was."""

from types import SimpleNamespace

import pytest

from lingrad.research import pictures


def entry(name, *series):
    """An entry whose final runs have measured ``x``."""
    runs = [SimpleNamespace(failed=False, measured={"x": points} if points else {}) for points in series]
    return SimpleNamespace(entry=SimpleNamespace(name=name), finals=runs)


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(pictures.plotting, "picture", lambda figure: figure)

    def draw(*entries):
        figure = pictures.diagnostics(entries)
        (axes,) = figure.axes
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        return axes, [[tuple(point) for point in line.get_xydata().tolist()] for line in axes.get_lines()], legend

    return draw


def test_seeds_are_averaged_at_each_step_that_they_have(drawn):
    axes, lines, legend = drawn(entry("a", [(1, 1.0), (2, 2.0), (4, 4.0)], [(2, 4.0), (4, 6.0), (6, 7.0)]), entry("b", None))
    assert lines == [[(1, 1.0), (2, 3.0), (4, 5.0), (6, 7.0)], []]
    assert legend == ["a"]
    assert axes.get_yscale() == "linear"
    assert axes.get_lines()[0].get_marker() != ""  # a single point is seen too


def test_what_differs_a_hundredfold_is_drawn_on_a_logarithmic_axis_without_zeros(drawn):
    axes, (line, _), _ = drawn(entry("a", [(1, 0.0), (2, 1e-9), (3, 1e-2)]), entry("b", [(1, 1e-5)]))
    assert axes.get_yscale() == "log"
    assert [value for _, value in line[1:]] == [1e-9, 1e-2]
    assert line[0][1] != line[0][1]
    axes, *_ = drawn(entry("a", [(1, -1.0), (2, 1e-9), (3, 1e-2)]))
    assert axes.get_yscale() == "linear"


def test_nothing_measured_is_no_picture():
    assert pictures.diagnostics([entry("a", None)]) == b""
