import sys
import zlib

import pytest
import torch

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
    """Mark as slow all cases of a test that is ``thinned(n)`` but the first and about each n-th, the same ones every time."""
    seen = set()
    for item in items:
        thinned = item.get_closest_marker("thinned")
        if thinned is None:
            continue
        test = item.nodeid.partition("[")[0]
        if test in seen and zlib.crc32(item.nodeid.encode()) % thinned.args[0]:
            item.add_marker("slow")
        seen.add(test)
