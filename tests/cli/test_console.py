"""Text for a terminal: aligned columns, layer numbers collapsed."""

import pytest

from lingrad.console import columns, layers

ROWS = [("name", "bytes"), ("a", "1"), ("a longer one", "")]


def test_columns_are_two_spaces_apart_without_spaces_at_the_end():
    assert columns(ROWS, [False, True]) == ["name          bytes", "a                 1", "a longer one"]


def test_a_rule_follows_the_header():
    header, rule, *lines = columns(ROWS, [False, True], rule=True)
    assert rule == "------------  -----"
    assert [header, *lines] == columns(ROWS, [False, True])


def test_no_rows_are_no_lines():
    assert columns([], [False, True]) == []


@pytest.mark.parametrize(
    ("name", "collapsed"),
    [("model.layers.0.q_proj", "model.layers.*.q_proj"), ("0.experts.12", "*.experts.*"), ("conv2.w1", "conv2.w1")],
)
def test_layer_numbers_are_collapsed(name, collapsed):
    assert layers(name) == collapsed
