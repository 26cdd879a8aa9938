import sys

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
