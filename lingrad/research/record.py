"""The record of one run, a JSON file from which it can be run again: laid out as those of PEFT's method_comparison.

Its three parts are PEFT's: ``run_info`` (what was run, by which revision), ``train_info`` (what was measured) and ``meta_info``
(packages and machine). ``run_info.job`` is what `lingrad.research.trial` takes.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lingrad.errors import DataError, in_short
from lingrad.files.reading import open_plain

RESULT = "result.json"
PACKAGES: tuple[str, ...] = (
    "lingrad",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "galore-torch",
)
PACKAGES += ("pytorch_optimizer", "optuna", "numpy")


def make_record(job: Mapping[str, Any], found: Mapping[str, Any], *, status: str, error: str, created: str) -> dict[str, Any]:
    """The record of a run.

    Args:
        job: What was run.
        found: What `lingrad.research.training.train` gave; empty where it failed.
        status: ``success``, ``pruned``, or the kind of failure: ``diverged``, ``out of memory``, ``disk full``, ``killed``,
            ``error``.
        error: The message of a failure.
        created: When it began, in ISO 8601.

    Returns:
        Plain values.
    """
    bytes_ = found.get("bytes", {})
    return {
        "run_info": {
            "created_at": created,
            "total_time": found.get("seconds", 0.0),
            "experiment_name": f"{job['content'].get('name', '')}/{job['entry']}",
            "lingrad_git": dict(git_state()),
            "job": dict(job),
            "error_msg": error,
        },
        "train_info": {
            "status": status,
            "train_time": found.get("seconds", 0.0),
            "refresh_time": found.get("refresh_seconds", 0.0),
            "step_time_median": found.get("step_seconds", 0.0),
            "num_trainable_params": found.get("trained", 0),
            "num_total_params": found.get("parameters", 0),
            "total_tokens": found.get("tokens", 0),
            "tokens_per_second": found["tokens"] / found["seconds"] if found.get("seconds") else 0.0,
            "steps": found.get("steps", 0),
            "state_bytes": bytes_.get("state", 0),
            "gradient_bytes": bytes_.get("gradients", 0),
            "gradient_bytes_median": bytes_.get("gradients_median", 0),
            "saved_activation_bytes": bytes_.get("saved", 0),
            "accelerator_memory_max": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "metrics": finite(found.get("metrics", {})),
        },
        "meta_info": {
            "package_info": {f"{name}-version": _version(name) for name in PACKAGES},
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "N/A",
            },
        },
    }


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for JSON, which has no infinite numbers: None for those."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's curve.

    Args:
        path: The file.

    Returns:
        ``step`` and numbers by name, None where one was not finite; no lines where there is no file.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is something else.
    """
    if not path.exists():
        return []
    with open_plain(path) as file:
        found = [json.loads(line) for line in file.read().splitlines()]
    for number, line in enumerate(found, start=1):
        if not isinstance(line, dict) or not is_number(line.get("step")) or not all(map(is_number, line.values())):
            raise ValueError(f"{path.name}, line {number}: expected a step and numbers")
    return found


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number, or None for one that was not finite."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def damaged(path: Path, error: Exception) -> DataError:
    """What to raise where a record cannot be read.

    Args:
        path: The record.
        error: Why.

    Returns:
        The error.
    """
    return DataError(f"the record {path} is damaged ({in_short(error)}); remove its folder and run the plan again")


def now() -> str:
    """The time, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@cache
def git_state() -> Mapping[str, Any]:
    """The revision of lingrad's own repository and whether it has changes; empty where it is installed from elsewhere."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return {}

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=30)  # noqa: S603, S607
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
