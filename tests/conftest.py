import gc
import os
import sys

# before torch is imported, here and in the processes that tests start: threads that wait for each other leave the core to the
# process that has something to do (a demo of several processes beside another test: 15 s instead of 81)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from tests.support import thinning

# two pytest workers on two cores: one thread each is faster than two that compete
torch.set_num_threads(1)


@pytest.fixture
def lingrad(monkeypatch, capsys):
    """The program in this process: exit status, output, errors."""
    from lingrad import __main__

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lingrad", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        return (caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items):
    """Mark cases as slow and exhaustive, the same ones every time.

    Of a test that is ``thinned(n)`` all cases but the first and about each n-th are slow. Of its slow cases those stay in the
    slow suite without which two values of two parameters would meet neither there nor in the default suite, where it has
    three parameters or more; about half of them where it has fewer; and about each m-th where it is ``rare(m)``. The others
    are exhaustive.
    """
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        for item in cases[1:]:
            thinned = item.get_closest_marker("thinned")
            if thinned is not None and thinning.number(item.nodeid) % thinned.args[0]:
                item.add_marker("slow")
        slow = [item for item in cases if item.get_closest_marker("slow") is not None]
        if all(in_pairs(item) for item in cases):
            kept = [thinning.values(item) for item in cases if item not in slow]
            stay = thinning.completing(kept, [thinning.values(item) for item in slow])
            left_out = [item for place, item in enumerate(slow) if place not in stay]
        else:
            left_out = [item for item in slow if thinning.number(item.nodeid) // 1009 % share(item)]
        for item in left_out:
            item.add_marker("exhaustive")


def in_pairs(item):
    """Whether a test is thinned to pairs."""
    named = {name: item.get_closest_marker(name) for name in ("thinned", "rare")}
    return named["thinned"] is not None and named["rare"] is None and len(thinning.values(item)) > 2


def share(item):
    """Of how many slow cases one is run by .ci/run."""
    rare = item.get_closest_marker("rare")
    return rare.args[0] if rare is not None else 1 if item.get_closest_marker("thinned") is None else 2


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """Keep what is imported and collected out of garbage collections, which would go through a million objects each time."""
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()
