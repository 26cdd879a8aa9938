"""Processes for trials that start at once: a host has imported what a trial needs, and forks for each.

The host is ``python -m lingrad.research.host PARENT``. It reads a line for each trial, writes the number of the process that it
forked, and what that process ended with. It imports, and computes nothing, so that it has no threads and no device is in use
when it forks. Where forks are not safe, as on macOS, it starts a new process for each.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from lingrad.research import trial

LIKELY = ("transformers.models.llama.modeling_llama", "peft", "lingrad.methods")  # what many trials import
POLL = 0.02  # seconds between looks at a trial
WIDTH = 12  # bytes of a number that a host writes


class Host:
    """A process that runs one trial after another, each in a fork; to its caller it is the process of the present one.

    Attributes:
        returncode: What the last trial ended with, below 0 the signal that ended it; None while it runs.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._trial = 0
        self.returncode: int | None = 0

    @property
    def free(self) -> bool:
        """Whether it can start a trial: none runs, and it was not killed itself."""
        return self.returncode is not None and (self._process is None or self._process.poll() is None)

    def start(self, job: Path, out: Path, errors: Path) -> None:
        """Start a trial; none may be running.

        Args:
            job: The file of the job.
            out: The folder it writes.
            errors: A file for its messages.
        """
        if self._process is None:
            words = [sys.executable, "-m", "lingrad.research.host", str(os.getpid())]
            pipe = subprocess.PIPE
            # in a session of its own, so that Ctrl-C does not reach it
            self._process = subprocess.Popen(words, bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True)  # noqa: S603
        self._trial, self.returncode = 0, None
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # the host is gone, which `poll` says
                self._process.stdin.write(json.dumps([str(job), str(out), str(errors)]).encode() + b"\n")

    def poll(self) -> int | None:
        """What the trial ended with; None while it runs."""
        while self.returncode is None and self._process is not None and self._process.stdout is not None:
            if not select.select([self._process.stdout], [], [], 0)[0]:
                break
            line = os.read(self._process.stdout.fileno(), WIDTH)
            if not line:  # the host itself was killed
                self.returncode = min(self._process.wait(), -1)
            elif self._trial:
                self.returncode = int(line)
            else:
                self._trial = int(line)
        return self.returncode

    def wait(self) -> int:
        """Wait until the trial has ended, and say with what."""
        while (code := self.poll()) is None:
            time.sleep(POLL)
        return code

    def kill(self) -> None:
        """End the trial at once."""
        while self.poll() is None and not self._trial:  # it is being forked
            time.sleep(POLL)
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._trial, signal.SIGKILL)

    def close(self) -> None:
        """End the trial, if one runs, and the host."""
        self.kill()
        self.wait()
        if self._process is not None:
            self._process.communicate()


def main(parent: int) -> None:
    """Run trials until there are no more, or the parent is gone.

    Args:
        parent: The number of the process that asks.
    """
    for name in LIKELY:
        with suppress(ImportError):
            import_module(name)
    for line in sys.stdin.buffer:
        job, out, errors = json.loads(line)
        child = _forked(job, out, errors) if sys.platform == "linux" else _started(job, out, errors)
        _say(child)
        _say(_ended(child, parent))


def _started(job: str, out: str, errors: str) -> int:
    """Start a process of its own for a trial."""
    words = [sys.executable, "-m", "lingrad.research.trial", job, out, str(os.getpid())]
    with Path(errors).open("wb") as file:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file).pid  # noqa: S603


def _forked(job: str, out: str, errors: str) -> int:
    """Fork a trial, which never returns."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        files = (os.open(os.devnull, os.O_RDWR), os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        for source, target in ((files[0], 0), (files[0], 1), (files[1], 2)):
            os.dup2(source, target)
        code = trial.main(job, out, str(os.getppid()))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _ended(child: int, parent: int) -> int:
    """What a child ended with; where the parent is gone, both end."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != parent:
            os.kill(child, signal.SIGKILL)
            os._exit(1)
        time.sleep(POLL)


def _say(number: int) -> None:
    os.write(1, f"{number:<{WIDTH - 1}}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
