"""Simulated memory against that of a real GPU."""

import gc

import pytest
import torch

from lingrad import memory
from lingrad.errors import DependencyError
from lingrad.memory.cuda.allocator import CachingAllocator
from lingrad.models import LlamaShape, build_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no simulated figure has been confirmed on a GPU"),
    pytest.mark.xdist_group("gpu"),  # one process: each run looks at the whole device's counters
]

SHAPE = LlamaShape(32000, 1024, 2736, 8, 16, 1024)
METHODS = {
    "sgd": memory.FullRank("sgd"),
    "adamw, fused": memory.FullRank("adamw", {"fused": True}),
    "adamw, foreach": memory.FullRank("adamw"),
    "lora": memory.Lora(64),
    "galore_torch": memory.GaloreTorch(256),
    **{
        f"lingrad, {spec}, {base}, {mode}": memory.Lingrad(spec, base, mode, {"lr": 1e-4})
        for spec, base in (
            ("svd(rank=256)", "adamw"),
            ("power(rank=256)", "adamw8bit"),
            ("random(rank=256)", "sgd"),
            ("svd(rank=128, side=both)", "adamw"),
        )
        for mode in ("optimizer", "adapter")
    },
    **{
        f"lingrad, offload, {mode}": memory.Lingrad("svd(rank=256)", "adamw", mode, {"lr": 1e-4, "offload": "moments, bases"})
        for mode in ("optimizer", "adapter")
    },
}


@pytest.mark.parametrize(
    ("checkpointing", "layerwise"),
    [
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        (True, True),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_simulated_and_measured_agree(method, checkpointing, layerwise, record_property):
    options = {"batch": 4, "length": 512, "dtype": torch.bfloat16, "checkpointing": checkpointing, "layerwise": layerwise}
    try:
        measured = memory.measure(lambda: build_llama(SHAPE, seed=0), METHODS[method], device="cuda", **options)
    except DependencyError as error:
        pytest.skip(str(error))
    simulated = memory.simulate(lambda: build_llama(SHAPE, seed=0), METHODS[method], device="cuda", **options)
    figures = {"simulated": simulated, "measured": measured}
    for name in ("peak", "allocated", "reserved", "steady"):
        record_property(name, tuple(getattr(report, name) for report in figures.values()))
    assert abs(simulated.peak - measured.peak) <= 0.05 * measured.peak
    assert simulated.steady == measured.steady


def test_an_ordinary_loop_is_tracked():
    model = torch.nn.Linear(512, 512).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    with memory.track(model, optimizer) as tracked:
        model(torch.randn(64, 512, device="cuda")).sum().backward()
        optimizer.step()
    report = tracked.report()
    assert report.device == "cuda"
    assert report.breakdown["moments"] >= 2 * 4 * 512 * 512
    assert sum(report.breakdown.values()) == report.peak


@pytest.mark.parametrize("seed", range(4))
def test_the_model_of_the_allocator_is_near_the_allocator(seed):
    """Sizes as in training, few and repeated, so that blocks are cached and used again; from an empty cache.

    Between free blocks of one size the address decides, and so the driver, which puts segments where earlier ones were: what is
    handed out (with the rests that are not split off) and what is reserved differ by that.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    at_first = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    if at_first != (0, 0):
        pytest.skip(f"something else holds memory of the device: {at_first}")
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(2 ** (9 + 16 * float(torch.rand((), generator=generator)))) for _ in range(20)]
    model, live, asked = CachingAllocator(), [], 0
    for _ in range(2000):
        if live and float(torch.rand((), generator=generator)) < 0.48:
            tensor, block = live.pop(int(torch.randint(len(live), (), generator=generator)))
            asked -= tensor.nbytes
            model.free(block)
            del tensor
        else:
            size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
            live.append((torch.empty(size, dtype=torch.uint8, device="cuda"), model.malloc(size)))
            asked += size
        assert torch.cuda.memory_stats()["requested_bytes.all.current"] == model.requested == asked
        assert abs(torch.cuda.memory_allocated() - model.allocated) <= 0.01 * model.allocated + 2**20
    assert abs(torch.cuda.max_memory_reserved() - model.peak_reserved) <= 0.06 * model.peak_reserved
