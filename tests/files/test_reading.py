"""Files of others: the right content, or an error of lingrad's within moments, whatever is in them."""

import json
import os
import signal
import struct
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingrad.errors import DataError
from lingrad.files.model_folder import ModelFolder
from lingrad.files.reading import LARGEST_JSON, open_plain, parse_json, read_json, read_text
from lingrad.files.tensorfile import DTYPES, TensorFile, in_memory, write_tensors
from lingrad.peft.read import read_adapter
from lingrad.peft.report import AdapterReport

SECONDS = 5.0  # a quadratic search through the headers here takes minutes


@contextmanager
def at_once():
    """Of this thread's processor time, which other work on the machine does not lengthen; and no waiting for ever."""

    def waited(*_):
        raise AssertionError("it waited for what never comes")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(120)
    start = time.thread_time()
    try:
        yield
        assert time.thread_time() - start < SECONDS
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def an_adapter(path):
    return read_adapter(path.parent, torch.nn.Linear(2, 2))


READERS = {
    "safetensors": (TensorFile, "model.safetensors"),
    "index": (lambda path: ModelFolder(path.parent), "model.safetensors.index.json"),
    "adapter config": (an_adapter, "adapter_config.json"),
    "report": (lambda path: AdapterReport.read(path.parent), "lingrad_report.json"),
    "text": (read_text, "text.txt"),
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path, reader, kind):
    read, name = READERS[reader]
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(os.devnull)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    with at_once(), pytest.raises(DataError):
        read(path)


def test_a_json_file_that_is_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_JSON + 1)  # takes no space on the disk
    with pytest.raises(OSError, match="it is larger than"):
        read_json(path)
    (tmp_path / "fine.json").write_text("[1]")
    assert read_json(tmp_path / "fine.json") == [1]


@pytest.mark.parametrize("text", ["a b\n", "\ufeffa b\n"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_text(tmp_path / "a.txt") == "a b\n"


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \n"])
def test_an_empty_text_is_refused(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=r"^the recipe .*a\.txt is empty$"):
        read_text(tmp_path / "a.txt", "recipe")


def test_a_text_that_is_larger_than_it_may_be_is_refused_and_not_cut(tmp_path):
    (tmp_path / "a.txt").write_text("abcd")
    assert read_text(tmp_path / "a.txt", largest=4) == "abcd"
    with pytest.raises(DataError, match="is larger than 3 bytes"):
        read_text(tmp_path / "a.txt", largest=3)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_of_another_program_has_whole_characters(tmp_path, encoding):
    path = tmp_path / "a.json"
    path.write_text('{"a": ["\\ud83d\\ude00", "\\\\ud800"]}', encoding=encoding)
    assert read_json(path, foreign=True) == {"a": ["\U0001f600", "\\ud800"]}
    for half in ('{"a": [["\\ud83d."]]}', '{"\\ud83d": 1}', '["\\ude00\\ud83d"]', '"\\uDe00"'):
        path.write_text(half, encoding=encoding)
        with pytest.raises(ValueError, match=r"a string has \\ud(e00|83d), half a character.*write both halves"):
            read_json(path, foreign=True)


def test_half_a_character_may_not_be_spelt_in_bytes_either():
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'"\xed\xa0\x80"')


def test_files_are_closed(tmp_path):
    with pytest.raises(IsADirectoryError):
        open_plain(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None  # noqa: PTH112, PTH208
    for _ in range(5):
        with pytest.raises(IsADirectoryError):
            open_plain(tmp_path)
    assert before is None or len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def header(shape, end=4):
    return '{"a":{"dtype":"F32","shape":[' + ",".join(map(str, shape)) + '],"data_offsets":[0,' + str(end) + "]}}"


def entry(i):
    return f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'


SLOW_HEADERS = {
    "a name twice": "{" + ",".join(map(entry, [*range(60_000), 59_999])) + "}",
    "dimensions": header([2**62] * 100_000),
    "dimensions of one": header([1] * 100_000),
    "long numbers": header(["9" * 100_000]),
    "nested": "[" * 100_000,
    "an empty side": header([2**62, 0], end=0),
}


@pytest.mark.parametrize("kind", SLOW_HEADERS)
def test_a_header_made_to_take_long_is_refused_at_once(tmp_path, kind):
    path = write(tmp_path / "slow.safetensors", SLOW_HEADERS[kind], bytes(4))
    with at_once(), pytest.raises(DataError):
        TensorFile(path)


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int8), "c": torch.zeros(0, 3)}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tensors(tmp_path_factory.mktemp("tensors") / "good.safetensors", in_memory(TENSORS))


def read_all(path):
    found = TensorFile(path)
    return {name: found.read(name) for name in found.entries}


def same_or_refused(path):
    """What safetensors' own reader gives, or an error of lingrad's."""
    from safetensors import safe_open

    try:
        with at_once():
            ours = read_all(path)
    except DataError:
        return
    with safe_open(path, "pt") as theirs:
        assert {*ours} == {*theirs.keys()}
        for name, value in ours.items():
            expected = theirs.get_tensor(name)
            assert value.dtype == expected.dtype
            assert value.shape == expected.shape
            assert value.view(torch.uint8).equal(expected.view(torch.uint8)) if value.numel() and value.dim() else True


def check_headers(file, place, key, value):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    names = [*content, "new"]
    name = names[place % len(names)]
    if key == "whole":
        content[name] = value
    else:
        content.setdefault(name, {})[key] = value
    same_or_refused(write(file.parent / "changed.safetensors", json.dumps(content), raw[8 + length :]))


def check_bytes(file, edits, cut):
    raw = bytearray(file.read_bytes())
    for place, byte in edits:
        raw[place % len(raw)] = byte
    (file.parent / "changed.safetensors").write_bytes(raw[: len(raw) - cut])
    same_or_refused(file.parent / "changed.safetensors")


headers = {
    "place": st.integers(0, 3),
    "key": st.sampled_from(["dtype", "shape", "data_offsets", "other", "whole"]),
    "value": values | st.lists(st.integers(0, 30), max_size=3),
}
edits = {
    "edits": st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    "cut": st.sampled_from([0, 0, 0, 1, 7, 8, 40]),
}
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
slow = settings(quick, max_examples=2_000)
thorough = settings(quick, max_examples=10_000)


@quick
@given(**headers)
def test_any_change_of_a_header_is_read_as_by_safetensors_or_refused(file, place, key, value):
    check_headers(file, place, key, value)


@quick
@given(**edits)
def test_any_change_of_bytes_is_read_as_by_safetensors_or_refused(file, edits, cut):
    check_bytes(file, edits, cut)


@pytest.mark.slow
@slow
@given(**headers)
def test_two_thousand_changes_of_a_header(file, place, key, value):
    check_headers(file, place, key, value)


@pytest.mark.slow
@slow
@given(**edits)
def test_two_thousand_changes_of_bytes(file, edits, cut):
    check_bytes(file, edits, cut)


@pytest.mark.slow
@pytest.mark.exhaustive
@thorough
@given(**headers)
def test_ten_thousand_changes_of_a_header(file, place, key, value):
    check_headers(file, place, key, value)


@pytest.mark.slow
@pytest.mark.exhaustive
@thorough
@given(**edits)
def test_ten_thousand_changes_of_bytes(file, edits, cut):
    check_bytes(file, edits, cut)
