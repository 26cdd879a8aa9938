"""Tests of several processes: one that a signal ends is an error, and says what its threads did."""

import ctypes
import os
import time

import pytest
from torch import distributed
from torch.multiprocessing.spawn import ProcessException

from tests.support.processes import each_rank


def abort(rank, world, beside):
    """The second process ends by a signal: in a thread of its own that runs no Python, or in this one."""
    if rank == 1 and beside:
        library = ctypes.CDLL(None)
        library.pthread_create(ctypes.byref(ctypes.c_ulong()), None, library.abort, None)
        time.sleep(60)  # longer than the signal takes
    elif rank == 1:
        os.abort()
    distributed.barrier()


@pytest.mark.parametrize("beside", [False, True])
def test_a_process_that_a_signal_ends_is_an_error_that_says_where(tmp_path, beside):
    with pytest.raises(ProcessException) as caught:
        each_rank(abort, 2, tmp_path, beside)
    stacks = "\n".join(caught.value.__notes__)
    assert "Fatal Python error: Aborted" in stacks
    assert "in abort" in stacks
    assert ("Current thread" in stacks) != beside
