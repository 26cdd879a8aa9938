"""Tests of several processes: which of those that a signal ends are run again."""

import ctypes
import os
import time
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException

from tests.support.processes import each_rank


def abort_at_first(rank, world, folder, how):
    """Of the first run the second process ends by a signal, in a thread of its own that runs no Python, or in this one."""
    runs = Path(folder) / f"runs-{rank}"
    count = len(runs.read_text()) if runs.exists() else 0
    runs.write_text("x" * (count + 1))
    if rank == 1 and (count == 0 or how == "always"):
        if how == "here":
            os.abort()
        library = ctypes.CDLL(None)
        library.pthread_create(ctypes.byref(ctypes.c_ulong()), None, library.abort, None)
        time.sleep(60)  # longer than the signal takes
    distributed.barrier()
    return torch.tensor(rank)


def runs(folder):
    return len((folder / "runs-1").read_text())


def test_a_run_that_a_thread_without_python_ends_is_repeated_once(tmp_path):
    with pytest.warns(UserWarning, match="aborted in a thread that runs no Python; it is run again"):
        assert each_rank(abort_at_first, 2, tmp_path, str(tmp_path), "beside") == [torch.tensor(0), torch.tensor(1)]
    assert runs(tmp_path) == 2


def test_one_that_is_ended_there_each_time_fails(tmp_path):
    with pytest.warns(UserWarning, match="run again"), pytest.raises(ProcessException):
        each_rank(abort_at_first, 2, tmp_path, str(tmp_path), "always")
    assert runs(tmp_path) == 2


def test_one_that_ends_in_a_thread_of_python_is_not_and_says_where(tmp_path):
    with pytest.raises(ProcessException) as caught:
        each_rank(abort_at_first, 2, tmp_path, str(tmp_path), "here")
    assert runs(tmp_path) == 1
    assert any("in abort_at_first" in note for note in caught.value.__notes__)
