"""Host time of a step, eager and under torch.compile: CPU seconds of one thread, methods in turn.

On tensors so small that nothing else shows (`plan.TINY`) it is what Python, autograd and the dispatcher take, which a GPU waits
for where its kernels are short. On a larger model it is the speed of a compiled step on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.plan import FULL, Workload
from benchmarks.steps import PHASES, MethodRun
from lingrad.console import markdown as tabulate
from lingrad.errors import in_short
from lingrad.models import LlamaShape

WARM_UP = 6  # steps; the first refreshes, and a compiled model is compiled in the first ones
NEVER = 10**6  # steps between refreshes
TIMEOUT = 900.0  # seconds for a process that compiles one model
Laps = dict[str, list[float]]  # phase -> seconds of each round


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in the calling thread only.

    Yields:
        None.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(runs: Mapping[str, MethodRun], batches: Sequence[Tensor]) -> dict[str, Laps]:
    """Time the phases of steps of several methods, which take turns.

    Args:
        runs: Key -> method under way.
        batches: A batch for each round; the first `WARM_UP` rounds are not timed.

    Returns:
        Key -> CPU seconds of this thread.
    """
    found: dict[str, Laps] = {key: {phase: [] for phase in PHASES} for key in runs}
    for number, batch in enumerate(batches):
        for key, run in runs.items():
            laps: dict[str, float] = {}
            started = time.thread_time()

            def lap(phase: str, laps: dict[str, float] = laps) -> None:
                laps[phase] = time.thread_time()

            run.step(batch, lap)
            if number >= WARM_UP:
                for phase, ended in laps.items():
                    found[key][phase].append(ended - started)
                    started = ended
    return found


def random_batches(workload: Workload, count: int) -> list[Tensor]:
    """Random token ids of a workload's batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.rows, workload.model.length)
    return [torch.randint(workload.model.vocabulary, shape, generator=generator) for _ in range(count)]


def eager(workload: Workload, keys: Sequence[str], rounds: int) -> dict[str, Laps]:
    """Host time of steps that refresh nothing.

    Args:
        workload: The model and the batch.
        keys: Of the methods.
        rounds: How many steps of each are timed.

    Returns:
        Key -> CPU seconds by phase.
    """
    measure.say(f"{workload.name}: host time of {len(keys)} methods, {workload.model.layers} layers, {workload.dtype}")
    with one_thread():
        runs = {key: MethodRun(key, workload, NEVER, "cpu") for key in keys}
        return take_turns(runs, random_batches(workload, WARM_UP + rounds))


def compiled(workload: Workload, keys: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Time compiled models, each in a process of its own, in turn with eager full AdamW.

    In one process the guards of several compiled models would be checked one after another.

    Args:
        workload: The model and the batch.
        keys: Of the methods.
        rounds: How many steps of each are timed.

    Returns:
        Key -> ``compiled`` and ``eager full`` (CPU seconds by phase), ``graphs`` and ``breaks`` that dynamo made; or ``error``.
    """
    found = {}
    for key in keys:
        measure.say(f"{workload.name}: {key}, compiled")
        given = {"key": key, "rounds": rounds, "workload": asdict(workload) | {"dtype": str(workload.dtype).split(".")[1]}}
        command = [sys.executable, "-m", "benchmarks.host", json.dumps(given)]
        found[key] = _answer(command)
    return found


def _answer(command: Sequence[str]) -> dict[str, Any]:
    try:
        root = Path(__file__).parents[1]
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT, check=True)  # noqa: S603
        answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        return {"error": (error.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"error": in_short(error)}
    return answer


def worker(given: dict[str, Any]) -> dict[str, Any]:
    """What a process of `compiled` does.

    Args:
        given: ``key``, ``rounds`` and ``workload``, as plain values.

    Returns:
        The entry of `compiled`.
    """
    from torch._dynamo.utils import counters

    described = given["workload"]
    described |= {"model": LlamaShape(**described["model"]), "dtype": getattr(torch, described["dtype"])}
    workload = Workload(**described)
    torch.set_num_threads(1)
    runs = {
        "eager full": MethodRun(FULL, workload, NEVER, "cpu"),
        "compiled": MethodRun(given["key"], workload, NEVER, "cpu", backend="inductor"),
    }
    found: dict[str, Any] = take_turns(runs, random_batches(workload, WARM_UP + given["rounds"]))
    return found | {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def totals(laps: Laps) -> list[float]:
    """Seconds of whole steps."""
    return [sum(parts) for parts in zip(*laps.values(), strict=True)]


def per_layer(keys: Sequence[str], rounds: int, dtype: torch.dtype, tiny: Workload, depths: tuple[int, int]) -> dict[str, Any]:
    """Host time of each phase as a linear function of the number of layers, from two depths that take turns.

    Args:
        keys: Of the methods.
        rounds: How many steps of each are timed.
        dtype: Of the weights.
        tiny: The workload, whose number of layers is replaced.
        depths: The two numbers of layers.

    Returns:
        Key -> phase -> (seconds of a model without layers, seconds of a layer).
    """
    few, many = depths
    with one_thread():
        runs = {}
        for key in keys:
            for depth in depths:
                workload = replace(tiny, model=replace(tiny.model, layers=depth), dtype=dtype)
                runs[f"{key} {depth}"] = MethodRun(key, workload, NEVER, "cpu")
        found = take_turns(runs, random_batches(tiny, WARM_UP + rounds))
    lines: dict[str, Any] = {}
    for key in keys:
        at = [{phase: median(found[f"{key} {depth}"][phase]) for phase in PHASES} for depth in depths]
        slopes = {phase: (at[1][phase] - at[0][phase]) / (many - few) for phase in PHASES}
        lines[key] = {phase: (at[0][phase] - few * slopes[phase], slopes[phase]) for phase in PHASES}
    return lines


def eager_table(found: dict[str, Laps]) -> str:
    """Host time by phase, and of whole steps relative to full AdamW, as Markdown."""
    rows = [("method", *(f"{phase}, ms" for phase in PHASES), "step in all, ms", "/ full")]
    for key, laps in found.items():
        cells = [f"{1e3 * median(laps[phase]):.2f}" for phase in PHASES]
        whole = totals(laps)
        rows.append((key, *cells, f"{1e3 * median(whole):.2f}", str(measure.ratio(whole, totals(found[FULL])))))
    return tabulate(rows)


def compiled_table(found: dict[str, dict[str, Any]]) -> str:
    """Compiled steps relative to eager and to compiled full AdamW, as Markdown; the last is a ratio of two processes."""
    rows = [("compiled method", "graphs", "breaks", "ms", "/ full, eager", "/ full, compiled")]
    ratios = {}
    for key, entry in found.items():
        if "error" not in entry:
            ratios[key] = measure.ratio(totals(entry["compiled"]), totals(entry["eager full"]))
    for key, entry in found.items():
        if "error" in entry:
            rows.append((key, "failed", "", "", entry["error"].replace("|", "/")[:80], ""))
            continue
        taken = 1e3 * median(totals(entry["compiled"]))
        relative = f"{ratios[key].middle / ratios[FULL].middle:.3f}" if FULL in ratios else ""
        rows.append((key, str(entry["graphs"]), str(entry["breaks"]), f"{taken:.2f}", str(ratios[key]), relative))
    return tabulate(rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        answer = worker(json.loads(sys.argv[1]))
    except Exception as error:  # of compilers, of methods
        answer = {"error": in_short(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
