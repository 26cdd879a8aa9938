"""Conversions that are killed, resumed, or run twice at once."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import filelock
import pytest
import torch

from lingrad import convert
from lingrad.convert import models as two_models
from lingrad.convert import work
from lingrad.errors import DataError
from tests.support.folders import contents, copy, edit, left_over

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)


class Stop(Exception):
    pass


def stop_after(count):
    def tick(done, total, name):
        if done == count:
            raise Stop

    return tick


class TestResume:
    def test_finished_modules_are_not_computed_again(self, models, expected, tmp_path, monkeypatch):
        asked = []
        real = two_models._find
        monkeypatch.setattr(two_models, "_find", lambda pair, **rest: asked.append(pair.name) or real(pair, **rest))
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(8))
        assert not (tmp_path / "out").exists()
        assert left_over(tmp_path) == [".out.partial"]
        assert len(asked) == 8
        convert.convert(*models, tmp_path / "out")
        assert len(set(asked)) == len(asked) == 21
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)

    def test_a_part_that_is_not_whole_is_computed_again(self, models, expected, tmp_path):
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(8))
        parts = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
        for i, part in enumerate(parts[:4]):
            whole = part.read_bytes()
            part.write_bytes(whole[: len(whole) // 2] if i % 2 else b"")
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected

    @pytest.mark.parametrize("stage", ["write_adapter", "check_structure", "publish"])
    def test_a_failure_at_the_end(self, models, expected, tmp_path, monkeypatch, stage):
        """While the adapter is written, checked or given its name: nothing looks complete, and the next call goes on."""

        def fail(*_, **__):
            raise Stop

        module = convert.writing.verify if stage == "check_structure" else convert.writing
        with monkeypatch.context() as patch:
            patch.setattr(module, stage, fail)
            with pytest.raises(Stop):
                convert.convert(*models, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(two_models, "_find", fail)
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected

    @pytest.mark.parametrize(
        ("options", "key"), [({"rank": 3}, "goal"), ({"dtype": "bf16"}, "dtype"), ({"full_svd": True}, "full_svd")]
    )
    def test_work_of_another_conversion_is_refused(self, models, tmp_path, options, key):
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(3))
        before = contents(tmp_path)
        with pytest.raises(
            DataError, match=rf"unfinished work of another conversion, which differs in '{key}'.* remove '.*\.out"
        ):
            convert.convert(*models, tmp_path / "out", **options)
        assert contents(tmp_path) == before

    def test_inputs_that_changed_meanwhile_are_refused(self, folders, tmp_path):
        with pytest.raises(Stop):
            convert.convert(*folders, tmp_path / "out", tick=stop_after(3))
        edit(folders[1], lambda t: t["model.norm.weight"].add_(1))
        with pytest.raises(DataError, match="which differs in 'tuned files'"):
            convert.convert(*folders, tmp_path / "out")

    def test_a_full_disk(self, models, expected, tmp_path, monkeypatch):
        """The error is one sentence; what was finished stays, and the same command ends with the same bytes."""
        real, written = os.fdopen, []

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, data):
                written.append(len(data))
                if len(written) > 20:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.file.write(data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdopen", lambda *args: Full(real(*args)))
            with pytest.raises(
                DataError, match=r"cannot write '.*out': .*No space left on device; what was finished is stored"
            ):
                convert.convert(*models, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not [path for path in (tmp_path / ".out.partial").iterdir() if path.name.startswith(".")]
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected

    def test_kill(self, models, expected, tmp_path):
        """SIGKILL as soon as the first part is there, then the same command: the same bytes."""
        program = textwrap.dedent(
            """
            import sys, time
            from lingrad import convert
            wait = float(sys.argv[4])
            convert.convert(*sys.argv[1:4], tick=lambda *_: time.sleep(wait))
            """
        )
        command = [sys.executable, "-W", "ignore", "-c", program, *map(str, models), str(tmp_path / "out")]
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        running = subprocess.Popen([*command, "0.2"], env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.partial/*.safetensors")):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (tmp_path / "out").exists()
        assert 1 <= len(list(tmp_path.glob(".out.partial/*.safetensors"))) < 21
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)


class TestTwoAtOnce:
    def test_the_second_is_refused_and_the_first_is_not_disturbed(self, models, expected, tmp_path):
        refused = []

        def tick(done, total, name):
            if done in (1, total):
                with pytest.raises(DataError, match="another process is writing '.*out' now") as caught:
                    convert.convert(*models, tmp_path / "out")
                refused.append(caught)

        convert.convert(*models, tmp_path / "out", tick=tick)
        assert len(refused) == 2
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)

    def test_the_lock_of_another_process_goes_with_it(self, tmp_path):
        """Refused while the other one is alive; after SIGKILL, which lets it clean up nothing, the lock is free."""
        program = (
            "import sys, time; from pathlib import Path; from lingrad.convert.work import WorkFolder; "
            "held = WorkFolder(Path(sys.argv[1]), {}); print('locked', flush=True); time.sleep(100)"
        )
        command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout.readline() == "locked\n"
            with pytest.raises(DataError, match="another process is writing '.*out' now; wait for it"):
                work.WorkFolder(tmp_path / "out", {})
            running.send_signal(signal.SIGKILL)
        work.WorkFolder(tmp_path / "out", {}).close()

    @pytest.mark.parametrize("refused", [False, True])
    def test_the_holder_removes_the_folder(self, tmp_path, monkeypatch, refused):
        """Between the opening of the lock's file and its locking; the lock of a file without a name guards nothing."""
        acquire, calls = filelock.BaseFileLock.acquire, []

        def acquired(lock, *args, **options):
            proxy = acquire(lock, *args, **options)
            if not calls:
                shutil.rmtree(tmp_path / ".out.partial")
            calls.append(lock)
            if refused and len(calls) == 1:
                lock.release()
                raise filelock.Timeout(lock.lock_file)
            return proxy

        monkeypatch.setattr(filelock.BaseFileLock, "acquire", acquired)
        held = work.WorkFolder(tmp_path / "out", {})
        assert len(calls) == 2
        with pytest.raises(DataError, match="another process is writing"):
            work.WorkFolder(tmp_path / "out", {})
        held.close()

    @pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
    def test_a_file_system_without_locks(self, models, expected, tmp_path, monkeypatch, error):
        def acquire(*_, **__):
            raise error

        monkeypatch.setattr(filelock.BaseFileLock, "acquire", acquire)
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)

    def test_what_is_not_ours_stays(self, models, expected, tmp_path):
        """A folder that happens to have the name of the hidden one is not taken; what a kill left of ours is cleared away."""
        hidden = tmp_path / ".out.partial"
        hidden.mkdir()
        (hidden / "notes.txt").write_text("mine")
        with pytest.raises(DataError, match="contains 'notes.txt', which is something else; move it"):
            convert.convert(*models, tmp_path / "out")
        assert contents(hidden) == {"notes.txt": b"mine"}
        (hidden / "notes.txt").unlink()
        (hidden / "finished").mkdir()
        for name in (".manifest.json.abc", "00003.safetensors", ".00004.safetensors.x1", "finished/adapter_config.json"):
            (hidden / name).write_bytes(b"left")
        convert.convert(*models, tmp_path / "out")
        assert contents(tmp_path / "out") == expected
        assert not left_over(tmp_path)

    def test_a_folder_that_came_meanwhile(self, models, tmp_path):
        with pytest.raises(Stop):
            convert.convert(*models, tmp_path / "out", tick=stop_after(2))
        (tmp_path / "out").mkdir()
        with pytest.raises(DataError, match="exists, and nothing is overwritten"):
            work.WorkFolder(tmp_path / "out", {})
        assert len(contents(tmp_path / ".out.partial")) == 4  # manifest, lock, two parts


def test_the_name_of_a_model_known_by_name(models, tmp_path, monkeypatch):
    """A folder `demo` is that folder."""
    copy(models[0], tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    convert.convert("demo", models[1], "out")
    convert.merge("demo", "out", "merged")
    assert not left_over(tmp_path)
