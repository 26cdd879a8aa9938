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
    """Mark cases as slow and exhaustive, the same ones every time.

    Of a test that is ``thinned(n)`` all cases but the first and about each n-th are slow; of one that is ``rare(m)``, all slow
    cases but about each m-th are exhaustive. What is thinned and has no other number is ``rare(2)``.
    """
    seen = set()
    for item in items:
        thinned, rare = item.get_closest_marker("thinned"), item.get_closest_marker("rare")
        test, number = item.nodeid.partition("[")[0], zlib.crc32(item.nodeid.encode())
        if thinned is not None and test in seen and number % thinned.args[0]:
            item.add_marker("slow")
        share = rare.args[0] if rare is not None else 2 if thinned is not None else 1
        if item.get_closest_marker("slow") is not None and number // 1009 % share:
            item.add_marker("exhaustive")
        seen.add(test)
