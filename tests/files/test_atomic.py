"""What is written: whole or not at all, where the path leads, and readable by whom the user lets read."""

import os
import stat
import threading
from pathlib import Path

import pytest

from lingrad.errors import DataError
from lingrad.files.atomic import new_file, new_folder, write_whole


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o002])
def test_the_umask_decides_who_reads_a_new_file_or_folder(tmp_path, umask, mask):
    umask(mask)
    write_whole(tmp_path / "file", b"x")
    with new_folder(tmp_path / "folder") as folder:
        write_whole(folder / "inner", b"x")
    assert mode_of(tmp_path / "file") == mode_of(tmp_path / "folder/inner") == 0o666 & ~mask
    assert mode_of(tmp_path / "folder") == 0o777 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_whole(path, b"new")
    assert (path.read_bytes(), mode_of(path)) == (b"new", mode)


def test_a_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "file", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lingrad.files.atomic.os.fdopen", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_is_followed_and_stays(tmp_path, depth, there):
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    link = target
    for i in range(depth):
        next_link = tmp_path / f"link{i}"
        next_link.symlink_to(link)
        link = next_link
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(p.name for p in target.parent.iterdir()) == ["target"]


def test_a_pipe_is_written_as_a_stream_and_stays(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_whole(path, b"through it")
    reader.join(60)
    assert read == [b"through it"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_device_is_written_as_a_stream_and_stays(tmp_path):
    """By a link to a terminal of our own: the system's devices are not touched."""
    controller, terminal = os.openpty()
    try:
        link = tmp_path / "out"
        link.symlink_to(os.ttyname(terminal))
        write_whole(link, b"shown")
        assert os.read(controller, 5) == b"shown"
        assert stat.S_ISCHR(link.stat().st_mode)
        assert link.is_symlink()
    finally:
        os.close(controller)
        os.close(terminal)


def test_what_another_process_has_open_as_its_output_is_written_to(tmp_path):
    """``--json /dev/stdout`` of a command whose output goes to a file: /proc/self/fd/N stands for such a path here."""
    with (tmp_path / "log").open("wb") as log:
        before = (tmp_path / "log").stat().st_ino
        write_whole(Path(f"/proc/self/fd/{log.fileno()}"), b"{}")
    assert (tmp_path / "log").read_bytes() == b"{}"
    assert (tmp_path / "log").stat().st_ino == before


@pytest.mark.parametrize("existing", [True, False])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, existing):
    path = tmp_path / "file"
    if existing:
        path.write_bytes(b"old")

    def fail():
        with new_file(path) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def test_a_folder_is_not_written_over_nor_left_half_written(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="exists, and nothing is overwritten"), new_folder(tmp_path / "there"):
        pass

    def fail():
        with new_folder(tmp_path / "new") as folder:
            write_whole(folder / "one", b"x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


MEMORY = Path("/dev/shm")  # noqa: S108 - the test is about this place


@pytest.mark.skipif(not MEMORY.is_dir(), reason="needs a file system in memory")
def test_a_plain_file_in_memory_is_written_whole():
    path = MEMORY / f"lingrad-test-{os.getpid()}"
    path.write_bytes(b"precious")
    try:

        def fail():
            with new_file(path) as file:
                file.write(b"half")
                raise OSError("memory full")

        with pytest.raises(OSError, match="memory full"):
            fail()
        assert path.read_bytes() == b"precious"
    finally:
        path.unlink()


def test_what_others_must_not_read_is_never_readable(tmp_path, umask):
    umask(0o022)
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with new_file(path) as file:
        file.write(b"new")
        assert {mode_of(found) for found in tmp_path.iterdir()} == {0o600}


def test_a_long_name_leaves_room_for_that_of_the_temporary_file(tmp_path):
    write_whole(tmp_path / ("n" * 250), b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["n" * 250]
