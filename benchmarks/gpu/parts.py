"""The parts of a run on a GPU: each gives its items, and what measures them."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lingrad
from benchmarks import launches, measure
from benchmarks.gpu.session import Item
from benchmarks.gpu.sizes import (
    ANY_RANK,
    COMPILED_KEYS,
    MEMORY_KEYS,
    PROFILE_KEYS,
    STEP_KEYS,
    THROUGHPUT_KEYS,
    Sizes,
)
from benchmarks.host import random_batches
from benchmarks.plan import ENTRIES, FULL, LORA_ONE, PERIOD, Workload
from benchmarks.steps import MethodRun, run_step
from lingrad import memory
from lingrad.models import build_llama

WARM_UP = 2  # steps: the first refreshes, the second finds its kernels
LAUNCHING = ("cudaLaunch", "cuLaunch")  # calls of CUDA that launch a kernel
ROOT = Path(__file__).parents[2]


def tests(sizes: Sizes, seconds: float) -> Iterator[Item]:
    """The tests that need a GPU, in a process of their own."""

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes.tests]
        try:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603
            output, code = ran.stdout + ran.stderr, ran.returncode
        except subprocess.TimeoutExpired as error:
            raw = error.stdout or b""
            output, code = raw if isinstance(raw, str) else raw.decode(errors="replace"), None
        lines = [line for line in output.splitlines() if line.strip()]
        failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
        last = lines[-1][:300] if lines else "no output"
        return {"code": code, "last": last if code is not None else f"not done in {seconds:.0f} s; {last}", "failed": failed}

    yield "pytest -m gpu", run


def merges(sizes: Sizes) -> Iterator[Item]:
    """A merge of float32 coordinates into a bfloat16 weight, compared with one product in bfloat16."""

    def run(m: int, n: int, rank: int) -> dict[str, Any]:
        coords, works = torch.randn(m, rank, device=sizes.device) * 1e-3, {}
        for merge in ("exact", "fast"):
            layer = torch.nn.Linear(n, m, bias=False, device=sizes.device, dtype=torch.bfloat16)
            rules = {"*": f"random(rank={rank}, side=right)"}
            (sub,) = lingrad.wrap(torch.nn.ModuleList([layer]), rules, "sgd", lr=0.1, merge=merge).subspaces
            works[merge] = partial(sub.weight.add_, sub.map(), coords)
        weight, right, narrow = layer.weight.detach(), coords.new_ones(n, rank).bfloat16(), coords.bfloat16()
        works["addmm_"] = lambda: weight.addmm_(narrow, right.t())
        taken = measure.in_turn(works, 3 * sizes.blocks, warm_up=2)
        return {"m": m, "n": n, "r": rank} | {key: median(seconds) for key, seconds in taken.items()}

    for m, n, rank in sizes.merges:
        yield f"{m} x {n}, r = {rank}", lambda m=m, n=n, rank=rank: run(m, n, rank)


def profile(sizes: Sizes) -> Iterator[Item]:
    """Launches by torch's profiler and as counted on meta tensors, and the time of host and card."""

    def run(key: str, workload: Workload) -> dict[str, Any]:
        with started(sizes, key, workload) as (step, _):
            host = []
            for _ in range(2 * sizes.blocks):
                began = measure.synchronized()
                step()
                host.append(time.perf_counter() - began)
            began = measure.synchronized()
            step()
            whole = measure.synchronized() - began
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if sizes.device == "cuda" else []
            with torch.profiler.profile(activities=kinds) as profiler:
                step()
                measure.synchronized()
            events = profiler.events()
        launched = sum(event.name.startswith(LAUNCHING) for event in events)
        busy = sum(e.time_range.elapsed_us() for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
        method = ENTRIES[key].make(workload.rank, PERIOD)
        counted = launches.count(method, workload.model, workload.dtype, workload.tokens).total.launches
        found = {"launches": launched, "counted": counted, "host": median(host), "card": busy / 1e6, "step": whole}
        return named(key, workload) | found

    for key in PROFILE_KEYS:
        yield key, lambda key=key: run(key, sizes.profile)


def steps(sizes: Sizes) -> Iterator[Item]:
    """Eager steps that refresh nothing."""
    done = set()
    for workload in sizes.steps:
        for key in STEP_KEYS:
            same = (key, workload.name, workload.tokens, key in ANY_RANK or workload.rank)
            if same not in done:
                done.add(same)
                yield label(key, workload), lambda key=key, workload=workload: timed(sizes, key, workload)


def compiled(sizes: Sizes) -> Iterator[Item]:
    """Steps whose model is compiled, and steps that are replayed as a CUDA graph."""
    for workload in sizes.compiled:
        for key in COMPILED_KEYS:
            name = f"{label(key, workload)}, compiled"
            yield name, lambda key=key, workload=workload: timed(sizes, key, workload, "compiled")
        for key in COMPILED_KEYS:
            name = f"{label(key, workload)}, captured"
            yield name, lambda key=key, workload=workload: timed(sizes, key, workload, "captured")


def peaks(sizes: Sizes) -> Iterator[Item]:
    """Peak memory of two steps, simulated and measured."""

    def run(key: str, workload: Workload) -> dict[str, Any]:
        given: dict[str, Any] = {"batch": workload.rows, "length": workload.model.length, "dtype": workload.dtype}
        reports = []
        for go in (memory.simulate, memory.measure):
            method = ENTRIES[key].make(workload.rank, PERIOD)
            reports.append(go(lambda: build_llama(workload.model, seed=0), method, device=sizes.device, **given))
            cleared()
        simulated, measured = ({"peak": r.peak, "allocated": r.allocated, "reserved": r.reserved} for r in reports)
        return named(key, workload) | {"simulated": simulated, "measured": measured}

    for key in MEMORY_KEYS:
        yield label(key, sizes.memory), lambda key=key: run(key, sizes.memory)


def throughput(sizes: Sizes) -> Iterator[Item]:
    """Tokens a second and peak memory, with activation checkpointing."""
    for key in THROUGHPUT_KEYS:
        yield (
            label(key, sizes.throughput),
            lambda key=key: timed(sizes, key, sizes.throughput, "eager", checkpointing=True),
        )


def label(key: str, workload: Workload) -> str:
    """A method on a workload."""
    return f"{workload.name}, r = {workload.rank}, {workload.tokens:,} tokens, {key}"


def named(key: str, workload: Workload) -> dict[str, Any]:
    """What tables are made by."""
    return {"key": key, "model": workload.name, "rank": workload.rank, "tokens": workload.tokens}


def timed(sizes: Sizes, key: str, workload: Workload, regime: str = "eager", *, checkpointing: bool = False) -> dict[str, Any]:
    """Time steps of a method, in blocks between which the host waits for the device.

    Args:
        sizes: The device, and how many steps.
        key: Of the method.
        workload: The model and the batch.
        regime: ``eager``, ``compiled`` or ``captured``.
        checkpointing: Recompute each layer in the backward.

    Returns:
        ``seconds`` a step, by block, and ``peak``, the most bytes that the allocator handed out.
    """
    with started(sizes, key, workload, regime, checkpointing=checkpointing) as (step, ready):
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        blocks = []
        for _ in range(sizes.blocks):
            began = measure.synchronized()
            for _ in range(sizes.repeats):
                step()
            blocks.append((measure.synchronized() - began) / sizes.repeats)
        peak = torch.cuda.max_memory_allocated() if sizes.device == "cuda" else None
    return named(key, workload) | {"regime": regime, "seconds": blocks, "peak": peak, "ready": ready}


@contextmanager
def started(
    sizes: Sizes, key: str, workload: Workload, regime: str = "eager", *, checkpointing: bool = False
) -> Iterator[tuple[Callable[[], Any], float]]:
    """A method past its first steps.

    Args:
        sizes: The device, and the backend of ``torch.compile``.
        key: Of the method.
        workload: The model and the batch.
        regime: ``eager``, ``compiled`` or ``captured``.
        checkpointing: Recompute each layer in the backward.

    Yields:
        What runs a step, and the seconds until it was ready.
    """
    began = measure.synchronized()
    cleared()
    if regime == "compiled":
        torch._dynamo.reset()  # guards of models before would be checked too
    run = MethodRun(
        key, workload, PERIOD, sizes.device, backend=sizes.backend if regime == "compiled" else "", checkpointing=checkpointing
    )
    try:
        (batch,) = (ids.to(sizes.device) for ids in random_batches(workload, 1))
        with _without_svd():
            run.step(batch)
        for _ in range(WARM_UP - 1):
            run.step(batch)
        step = captured(run, key, batch) if regime == "captured" else lambda: run.step(batch)
        yield step, measure.synchronized() - began
    finally:
        run.training.close()


def captured(run: MethodRun, key: str, batch: Tensor) -> Callable[[], Any]:
    """What replays a step as a CUDA graph: by ``opt.capture`` for lingrad, else by torch's own recipe.

    Args:
        run: The method, past its first steps.
        key: Its key.
        batch: Token ids, read by every replay.

    Returns:
        What replays the step.

    Raises:
        NotImplementedError: The device has no graphs.
    """
    if not torch.cuda.is_available():
        raise NotImplementedError("CUDA graphs need CUDA")
    (optimizer,) = run.training.optimizers
    if key not in (FULL, LORA_ONE):
        for group in optimizer.param_groups:
            group.update(lr=torch.tensor(group["lr"], device=batch.device), capturable=True)
        replay: Callable[[], Any] = optimizer.capture(lambda: run_step(run.training, batch), warmup=1)
        for _ in range(WARM_UP):  # past the capture
            replay()
        return replay
    for group in optimizer.param_groups:
        group["capturable"] = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run.step(batch)
    torch.cuda.current_stream().wait_stream(side)
    run.training.zero_grad()  # so that the graph's own memory holds the gradients
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.step(batch)
    return graph.replay


def cleared() -> None:
    """Free what no one holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _without_svd() -> Iterator[None]:
    """Random matrices instead of singular vectors: galore_torch's first SVDs would take minutes, and no later step is slower.

    Yields:
        None.
    """

    def instead(matrix: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        m, n = matrix.shape
        k = min(m, n)
        left, right = matrix.new_empty(m, k).normal_(std=m**-0.5), matrix.new_empty(k, n).normal_(std=n**-0.5)
        return left, matrix.new_ones(k), right

    with mock.patch.object(torch.linalg, "svd", instead):
        yield


PARTS: dict[str, Callable[..., Iterator[Item]]] = {
    "tests": tests,
    "merges": merges,
    "profile": profile,
    "steps": steps,
    "compiled": compiled,
    "memory": peaks,
    "throughput": throughput,
}
