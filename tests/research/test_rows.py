"""Rows of JSON and Parquet, and how they are dealt out."""

import json

import pytest

from lingrad.errors import DataError
from lingrad.research.rows import deal, read_rows, shuffled
from tests.support.language import write_rows

pytest.importorskip("pyarrow", reason="make test installs it (extra: trl)")
ROWS = [{"text": f"line\u2028{i}", "label": i, "other": None} for i in range(20)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_format_has_the_same_rows(tmp_path, name):
    path = write_rows(tmp_path / name, ROWS)
    assert read_rows(path) == ROWS
    wanted = [{"text": row["text"], "label": row["label"]} for row in ROWS]
    assert [{key: row[key] for key in ("text", "label")} for row in read_rows(path, "text", "label")] == wanted


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\\ud83d\\ude00"}\r\n'),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": "\\ud83d\\ude00"}'),  # two files that were joined
        ("a.json", b'\xef\xbb\xbf [{"a": 1}, {"a": "\\ud83d\\ude00"}]'),
    ],
)
def test_a_byte_order_mark_is_left_out(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read_rows(tmp_path / name, "a") == [{"a": 1}, {"a": "\U0001f600"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"b": 1}\n', "a.jsonl, row 2: expected 'a' in every row; its keys are b"),
        ("a.jsonl", b"3\n", "a.jsonl, row 1: expected 'a' in every row; it is no mapping"),
        ("a.jsonl", b'{"a": 1}\n{"a":\n', "a.jsonl, line 2 is no JSON: "),
        ("a.jsonl", b'{"a": 1}\n{"a": ["\\ud800"]}\n', "a.jsonl, line 2 is no JSON: a string has \\ud800, half a character"),
        ("a.json", b'[{"\\uDC00": 1}]', "a.json is no JSON: a string has \\udc00, half a character"),
        ("a.json", b'[{"a": 1}', "a.json is no JSON: "),
        ("a.parquet", b"PAR", "a.parquet is no Parquet file that can be read: "),
        ("gone.jsonl", None, "gone.jsonl: No such file or directory"),
        ("gone.parquet", None, "gone.parquet: No such file or directory"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name, "a")
    assert message in str(caught.value)


def test_a_missing_column_of_parquet_is_named(tmp_path):
    path = write_rows(tmp_path / "a.parquet", ROWS)
    with pytest.raises(DataError, match="has no column 'words'; its columns are label, other, text"):
        read_rows(path, "words")


def test_every_row_is_dealt_once():
    parts = deal(ROWS)
    assert {part: len(rows) for part, rows in parts.items()} == {"final": 4, "tuning": 2, "training": 14}
    assert sorted(row["label"] for rows in parts.values() for row in rows) == list(range(20))
    assert deal(ROWS) == parts


def test_each_row_is_seen_before_one_is_seen_again():
    batches = list(shuffled(range(6), steps=6, size=4, seed=1))
    seen = [row for batch in batches for row in batch]
    assert all(sorted(seen[i : i + 6]) == list(range(6)) for i in range(0, 24, 6))
    assert batches != list(shuffled(range(6), steps=6, size=4, seed=2))
    assert json.dumps(batches) == json.dumps(list(shuffled(range(6), steps=6, size=4, seed=1)))
