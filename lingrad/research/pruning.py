"""Pruning: a trial is judged on its way, at rungs, and stopped where others were better there.

The trial asks in a file next to its job, and waits; the process that started it reports the value to Optuna and answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingrad.errors import optional
from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_json

Verdict = Callable[[int, float], bool]  # a rung, from 1, and the metric there -> whether to stop
STARTUP = 2  # trials that must have ended before the median of them stops others
POLL = 0.02  # seconds between looks for an answer


def rung_steps(steps: int, rungs: int) -> dict[int, int]:
    """After which steps a trial is judged.

    Args:
        steps: Steps of a whole run.
        rungs: How many rungs.

    Returns:
        Step -> rung: the last rung is at half of the steps, each one before it at half of the next one's.
    """
    return {steps >> (rungs + 1 - rung): rung for rung in range(1, rungs + 1) if steps >> (rungs + 1 - rung)}


def resource(rung: int) -> int:
    """What a rung is for Optuna, which halves at 1, 2, 4, ..."""
    return 1 << (rung - 1)


def optuna_pruner(name: str) -> Any:
    """A pruner of Optuna's.

    Args:
        name: ``median``: stops a trial that is worse than the median of those that have ended were at that rung; ``halving``:
            lets the better half of those that have come to a rung go on (Li et al., 2020, arXiv 1810.05934); ``none``.

    Returns:
        The pruner.
    """
    pruners = optional("optuna", "searching", "research").pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=STARTUP)
    return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2) if name == "halving" else pruners.NopPruner()


@dataclass(frozen=True)
class Channel:
    """The files by which a trial and the process that started it speak.

    Args:
        job: The file of the trial's job.
    """

    job: Path

    def ask(self, rung: int, value: float) -> bool:
        """Ask whether to stop, in the trial, and wait for the answer.

        Args:
            rung: The rung.
            value: The metric there.

        Returns:
            Whether to stop.
        """
        write_whole(self._question, json.dumps([rung, value]).encode())
        while True:
            if self._answer.exists():
                answered, stop = read_json(self._answer)
                if answered == rung:
                    self._answer.unlink()
                    return bool(stop)
            time.sleep(POLL)

    def reply(self, verdict: Verdict) -> None:
        """Answer the trial, where it has asked.

        Args:
            verdict: What says whether to stop.
        """
        if self._question.exists():
            rung, value = read_json(self._question)
            stop = verdict(rung, value)
            self._question.unlink()
            write_whole(self._answer, json.dumps([rung, stop]).encode())

    def clear(self) -> None:
        """Remove the files."""
        for path in (self._question, self._answer):
            path.unlink(missing_ok=True)

    @property
    def _question(self) -> Path:
        return self.job.with_suffix(".rung")

    @property
    def _answer(self) -> Path:
        return self.job.with_suffix(".verdict")
