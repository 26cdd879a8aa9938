"""The hosts of trials go from test to test: what takes their time is what they import."""

import pytest

from lingrad.research import execution
from lingrad.research.host import Host


class KeptHost(Host):
    """A host that is kept when it is closed, for the next caller; one that was killed is not."""

    kept: list[Host] = []  # noqa: RUF012 - of the class

    def __new__(cls):
        """One that is kept, or a new one."""
        return cls.kept.pop() if cls.kept else super().__new__(cls)

    def __init__(self):
        if not vars(self):
            super().__init__()

    def close(self):
        """End the trial, if one runs, and keep the host."""
        self.kill()
        self.wait()
        if self.free:
            self.kept.append(self)


@pytest.fixture(scope="session", autouse=True)
def kept_hosts():
    """All that is executed in tests is executed by hosts that are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "Host", KeptHost)
        yield
    while KeptHost.kept:
        Host.close(KeptHost.kept.pop())
