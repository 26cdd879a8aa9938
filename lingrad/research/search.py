"""The trials of a study, in Optuna's storage: which are made, by whom, and what came of them.

Each entry has two of Optuna's studies: its search, and the final runs of its best trial, one for each seed. A trial is known by
its number. What it tries depends on the plan and that number alone (with TPE, on the trials before it), so that it does not
matter who makes it, when, or how often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from typing_extensions import override

from lingrad.errors import DataError, optional
from lingrad.research.axes import grid
from lingrad.research.plan import PlanEntry, ResearchPlan
from lingrad.research.pruning import optuna_pruner, resource

JOURNAL = "search.journal"
ATTEMPTS = 4  # at opening a storage
PATIENCE = 120.0  # seconds without a sign of life, after which a trial that runs elsewhere is taken over
PRUNED = "pruned"  # the status of a trial that was stopped at a rung
_OWNER, _BEAT, _FAILURE, _MEASURED, _VERDICTS = "owner", "beat", "failure", "measured", "verdicts"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Args:
        number: Its number.
        values: What it tried.
        value: What it is compared by; None where it failed or was pruned.
        measured: Its ``state_bytes``, ``train_time`` and ``steps``, and how long all of it ``took``, in seconds.
    """

    number: int
    values: Mapping[str, Any]
    value: float | None
    measured: Mapping[str, float] = field(default_factory=dict)


def open_storage(out: Path, url: str | None) -> Any:
    """Optuna's storage.

    Args:
        out: The folder of the results, which holds a journal by default.
        url: A database that several machines share, such as ``sqlite:///trials.db``; None is the journal.

    Returns:
        The storage.

    Raises:
        DataError: It cannot be opened.
    """
    optuna = _optuna()
    journal = optuna.storages.journal
    attempt = 0
    while True:
        try:
            if url is not None:
                return optuna.storages.RDBStorage(url)
            return optuna.storages.JournalStorage(journal.JournalFileBackend(str(out / JOURNAL)))
        except Exception as error:  # of SQLAlchemy and its drivers
            attempt += 1
            if attempt == ATTEMPTS or isinstance(error, ImportError):
                raise DataError(f"cannot open the storage {url or out / JOURNAL}: {error}") from error
            time.sleep(attempt)  # another machine is making its tables


class Trials:
    """The trials of one entry, of its search or its final runs.

    Args:
        plan: The plan.
        entry: The entry.
        storage: Optuna's storage.
        best: For final runs: what the best trial tried; None for the search.
    """

    def __init__(self, plan: ResearchPlan, entry: PlanEntry, storage: Any, best: Mapping[str, Any] | None = None) -> None:
        self.entry, self.best, self._storage = entry, best, storage
        self.count = plan.trials if best is None else len(plan.seeds)
        self._in_order = plan.sampler == "tpe" and best is None  # each trial depends on those before it
        self._study = _optuna().create_study(
            study_name=f"{plan.name} {plan.digest}/{entry.name}/{'search' if best is None else 'final'}",
            storage=storage,
            sampler=_sampler(plan, entry) if best is None else None,
            pruner=optuna_pruner(plan.pruner if best is None else "none"),
            direction="maximize" if plan.task.greater else "minimize",
            load_if_exists=True,
        )
        self._suggested = {} if best is not None else {key: _distribution(axis) for key, axis in entry.space.items()}

    def take(self) -> tuple[int, Mapping[str, Any]] | None:
        """Take a trial that nobody runs: a new one, or one whose process has ended without a result.

        Returns:
            Its number, and what it tries; None where there is none now.
        """
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials[: self.count]:
            if not trial.state.is_finished() and _is_left(trial):
                self._sign(trial.number)
                return trial.number, self.best if self.best is not None else trial.params
        running = any(not trial.state.is_finished() for trial in trials)
        if len(trials) >= self.count or (running and self._in_order):
            return None
        trial = self._study.ask(self._suggested)
        if trial.number >= self.count:  # another process was faster
            self._study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)
            return None
        self._sign(trial.number)
        return trial.number, self.best if self.best is not None else trial.params

    def stops(self, number: int, rung: int, value: float) -> bool:
        """Note what a trial has come to at a rung, and say whether it is to be stopped there.

        Args:
            number: Its number.
            rung: The rung.
            value: What it is compared by.

        Returns:
            What the pruner says; of a rung that was noted before it was interrupted, what was said then.
        """
        trial = self._study.get_trials(deepcopy=False)[number]
        said: dict[str, bool] = dict(trial.user_attrs.get(_VERDICTS, {}))
        if str(rung) not in said and not trial.state.is_finished():  # else its record was removed, and is made again
            self._storage.set_trial_intermediate_value(trial._trial_id, resource(rung), value)
            judged = self._storage.get_trial(trial._trial_id)
            said[str(rung)] = bool(self._study.pruner.prune(self._study, judged))
            self._set(number, _VERDICTS, said)
        return said.get(str(rung), False)

    def finish(self, number: int, value: float | None, failure: str, measured: Mapping[str, float]) -> None:
        """Note what became of a trial.

        Args:
            number: Its number.
            value: Its value; None where it failed.
            failure: The kind of failure, or `PRUNED`; empty where there was none.
            measured: Its ``state_bytes``, ``train_time`` and ``steps``, and how long all of it ``took``, in seconds.
        """
        state = _optuna().trial.TrialState
        self._set(number, _FAILURE, failure)  # for Optuna's dashboard
        self._set(number, _MEASURED, dict(measured))
        if failure == PRUNED:
            self._study.tell(number, state=state.PRUNED, skip_if_finished=True)
        elif value is None or not math.isfinite(value):
            self._study.tell(number, state=state.FAIL, skip_if_finished=True)
        else:
            self._study.tell(number, value, skip_if_finished=True)

    def beat(self, number: int) -> None:
        """Give a sign of life of a trial."""
        self._set(number, _BEAT, time.time())

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        trials = self._study.get_trials(deepcopy=False)
        return len(trials) >= self.count and all(trial.state.is_finished() for trial in trials[: self.count])

    def outcomes(self) -> list[Outcome]:
        """Those that have ended, by number."""
        trials = [trial for trial in self._study.get_trials(deepcopy=False)[: self.count] if trial.state.is_finished()]
        whole = _optuna().trial.TrialState.COMPLETE  # a pruned one has the value of its last rung, which is no result
        return [
            Outcome(
                t.number, dict(self.best or t.params), t.value if t.state == whole else None, t.user_attrs.get(_MEASURED, {})
            )
            for t in trials
        ]

    def chosen(self, *, greater: bool) -> Outcome | None:
        """The best of them, of equal ones the first; None where all failed."""
        found = [one for one in self.outcomes() if one.value is not None]
        return min(found, key=lambda one: (-(one.value or 0.0) if greater else one.value, one.number), default=None)

    def seconds_of_a_step(self) -> list[float]:
        """What a step took in each trial that has a value."""
        return [one.measured["train_time"] / one.measured["steps"] for one in self.outcomes() if one.value is not None]

    def _sign(self, number: int) -> None:
        self._set(number, _OWNER, f"{platform.node()} {os.getpid()}")
        self.beat(number)

    def _set(self, number: int, key: str, value: Any) -> None:
        trial = self._study.get_trials(deepcopy=False)[number]
        with contextlib.suppress(_optuna().exceptions.UpdateFinishedTrialError):  # another process was faster
            self._storage.set_trial_user_attr(trial._trial_id, key, value)  # as `Trial.set_user_attr` does


def _is_left(trial: Any) -> bool:
    """Whether whoever ran a trial has ended: its process, on this machine; elsewhere its signs of life."""
    host, _, process = str(trial.user_attrs.get(_OWNER, "")).rpartition(" ")
    if host == platform.node() and process.isdigit():
        if int(process) == os.getpid():
            return False
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    beat = trial.user_attrs.get(_BEAT) or (trial.datetime_start.timestamp() if trial.datetime_start else 0.0)
    return bool(time.time() - beat > PATIENCE)


def _sampler(plan: ResearchPlan, entry: PlanEntry) -> Any:
    """A sampler whose choice for a trial depends on its number: one of Optuna's, with a seed for each."""
    samplers = _optuna().samplers
    points = grid(entry.space) if plan.sampler == "grid" else []

    @functools.lru_cache(maxsize=1)
    def of(number: int) -> Any:
        seed = crc32(f"{plan.seed}/{plan.digest}/{entry.name}/{number}".encode())
        return samplers.TPESampler(seed=seed) if plan.sampler == "tpe" else samplers.RandomSampler(seed=seed)

    class ByNumber(samplers.BaseSampler):  # type: ignore[misc, name-defined]
        @override
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        @override
        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return {}

        @override
        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            if points:
                return points[trial.number % len(points)][param_name]
            return of(trial.number).sample_independent(study, trial, param_name, param_distribution)

    return ByNumber()


def _distribution(axis: Any) -> Any:
    kinds = _optuna().distributions
    if axis.values:
        return kinds.CategoricalDistribution(axis.values)
    if axis.whole:
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)


def _optuna() -> Any:
    found = optional("optuna", "searching", "research")
    found.logging.set_verbosity(found.logging.ERROR)
    return found
