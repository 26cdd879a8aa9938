"""What logs runs elsewhere, such as to TensorBoard: trackers of accelerate, and of one's own. None unless a plan names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lingrad.errors import DependencyError, SpecError, did_you_mean, optional
from lingrad.research.objects import is_object, load_object

FOLDER = "trackers"  # in that of a run, for trackers that write files
LogValues = Callable[[Mapping[str, Any], int], None]  # numbers by name, and the step


def check_trackers(names: Sequence[str]) -> None:
    """See that trackers can be used.

    Args:
        names: Names of accelerate, such as ``tensorboard``, or ``FILE.py:CLASS``.

    Raises:
        SpecError: There is no such tracker.
        DependencyError: The package of one is not installed.
    """
    wanted = [name for name in names if not is_object(name)]
    if not names:
        return
    tracking = optional("accelerate.tracking", "logging to trackers", "hf")
    known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
    available = [str(getattr(name, "value", name)) for name in tracking.get_available_trackers()]
    for name in wanted:
        if name not in known:
            near = did_you_mean(name, known)
            raise SpecError(f"there is no tracker '{name}'{near} Known: {', '.join(known)}, FILE.py:CLASS", option="trackers")
        if name not in available:
            package = name.replace("_", "-")
            raise DependencyError(f"the tracker {name} needs its package, which is not installed: pip install {package}")


@contextmanager
def tracked(
    names: Sequence[str], folder: Path, *, project: str, run: str, config: Mapping[str, Any], out: Path
) -> Iterator[LogValues]:
    """LogValues a run to trackers, through accelerate's `init_trackers` and `log`.

    Args:
        names: Names of accelerate, or ``FILE.py:CLASS``, a class derived from accelerate's ``GeneralTracker``, of which an
            object is made with the name of the run and a folder.
        folder: What names of files are relative to.
        project: The name of the plan.
        run: The name of the run.
        config: Texts and numbers that say what is run.
        out: The folder of the run; trackers that write files do so in its `FOLDER`.

    Yields:
        A function that logs finite numbers; of no tracker it does nothing.
    """
    if not names:
        yield lambda values, step: None
        return
    check_trackers(names)
    place = out / FOLDER
    own: list[Any] = [load_object(name, folder)(run, str(place)) if is_object(name) else name for name in names]
    accelerate = optional("accelerate", "logging to trackers", "hf")
    accelerator = accelerate.Accelerator(cpu=True, log_with=own, project_dir=str(place))  # it trains nothing
    accelerator.init_trackers(project, config={"run": run, **config})

    def log(values: Mapping[str, Any], step: int) -> None:
        accelerator.log({key: value for key, value in values.items() if math.isfinite(value)}, step=step)

    try:
        yield log
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
