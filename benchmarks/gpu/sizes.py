"""What is measured on a GPU: shapes, models, methods. Data only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.plan import ADAPTER, FROZEN, FULL, GALORE, LLAMA_1024, LORA, LORA_ONE, PAGED, RANDOM, SIZES, TINY, Workload
from lingrad.models import LlamaShape

STEP_KEYS = (FULL, RANDOM, ADAPTER, LORA_ONE, FROZEN, PAGED, LORA, GALORE)
PROFILE_KEYS = (FULL, RANDOM, ADAPTER, LORA_ONE, FROZEN, GALORE)
COMPILED_KEYS = (FULL, RANDOM, ADAPTER, LORA_ONE)
MEMORY_KEYS = (FULL, RANDOM, ADAPTER, LORA_ONE)
THROUGHPUT_KEYS = (RANDOM, ADAPTER, LORA, PAGED, FULL)
ANY_RANK = (FULL, FROZEN, PAGED)  # methods without a rank: measured at the first one
GPU_TESTS = (  # the files with tests that need a GPU; to collect the others would take a minute
    "tests/contract/test_gpu.py",
    "tests/contract/test_gpu_integration.py",
    "tests/memory/test_gpu.py",
    "tests/optimizers/test_eight_bit.py",
    "tests/peft/test_export.py",
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Args:
        device: ``cuda`` or ``cpu``.
        merges: (m, n, r) of the weights and coordinates that are merged.
        profile: The workload whose launches and host time are counted and measured.
        steps: Workloads whose eager steps are timed, the most important first.
        compiled: Workloads whose compiled and captured steps are timed.
        memory: The workload whose peak memory is simulated and measured.
        throughput: The workload whose tokens per second are measured, with checkpointing.
        repeats: Steps in a block that is timed.
        blocks: Blocks; the median is reported.
        tests: What pytest is to run.
        backend: Of ``torch.compile``.
    """

    device: str
    merges: tuple[tuple[int, int, int], ...]
    profile: Workload
    steps: tuple[Workload, ...]
    compiled: tuple[Workload, ...]
    memory: Workload
    throughput: Workload
    repeats: int = 4
    blocks: int = 3
    tests: tuple[str, ...] = ("-m", "gpu", "-n", "4", "--maxfail=20", *GPU_TESTS)
    backend: str = "inductor"


def _of(name: str, rank: int, tokens: int) -> Workload:
    shape = LLAMA_1024.model if name == "llama1024" else SIZES[name.split(",")[0]]
    if name == "7B, 4 layers":
        shape = replace(shape, layers=4)
    return Workload(name, shape, tokens // shape.length, rank, torch.bfloat16)


# Llama 3.1 8B, on 2 x 2,048 tokens: the setting of torchtune's README
LLAMA_8B = Workload("Llama 3.1 8B", LlamaShape(128256, 4096, 14336, 32, 32, 2048, groups=8), 2, 64, torch.bfloat16)

REAL = Sizes(
    "cuda",
    tuple((m, 4096, rank) for m in (4096, 11008) for rank in (128, 1024)),
    _of("llama1024", 128, 2048),
    (
        *(_of("7B, 4 layers", rank, tokens) for rank in (1024, 128) for tokens in (2048, 8192)),
        *(_of("llama1024", 128, tokens) for tokens in (2048, 8192)),
        *(_of("1B", rank, tokens) for rank in (128, 512) for tokens in (2048, 8192)),
        *(_of("7B, 4 layers", 512, tokens) for tokens in (2048, 8192)),
    ),
    (_of("llama1024", 128, 2048), _of("7B, 4 layers", 1024, 2048), _of("7B, 4 layers", 128, 8192), _of("1B", 128, 2048)),
    _of("7B, 4 layers", 1024, 2048),
    LLAMA_8B,
)
_SMALL = replace(TINY, model=replace(TINY.model, layers=1))
DRY = Sizes(
    "cpu",
    ((16, 8, 2),),
    _SMALL,
    (_SMALL,),
    (_SMALL,),
    _SMALL,
    replace(_SMALL, rows=2),
    repeats=1,
    blocks=1,
    tests=("--version",),
    backend="eager",
)
BUDGETS = {
    "tests": 150.0,
    "merges": 20.0,
    "profile": 45.0,
    "steps": 170.0,
    "compiled": 90.0,
    "memory": 35.0,
    "throughput": 80.0,
}
