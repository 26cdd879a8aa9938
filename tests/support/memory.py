"""A small Llama whose memory is looked at."""

from lingrad import memory
from lingrad.models import LlamaShape, build_llama

SHAPE = LlamaShape(1000, 128, 344, 3, 4, 256)

LEEWAY = 64 * 1024  # what allocations inside kernels may add, which no dispatch mode sees

LINGRAD = {
    f"{spec}, {mode}": memory.Lingrad(spec, base, mode, {"lr": 1e-3})
    for spec, base in (
        ("svd(rank=16)", "adamw"),
        ("svd(rank=16, side=both)", "sgd"),
        ("power(rank=16)", "adamw"),
        ("random(rank=16)", "lion"),
        ("pca(rank=16)", "adamw"),
    )
    for mode in ("optimizer", "adapter")
}

METHODS = {
    "sgd": memory.FullRank("sgd", {"momentum": 0.9}),
    "adamw, loop": memory.FullRank("adamw", {"foreach": False, "fused": False}),
    "adamw, foreach": memory.FullRank("adamw", {"foreach": True}),
    "adamw, fused": memory.FullRank("adamw"),
    "lora": memory.Lora(8),
    "lora, one side frozen": memory.Lora(8, one_sided=True),
    "galore_torch": memory.GaloreTorch(16),
    **LINGRAD,
}

RECIPES = {"plain": {}, "checkpointing": {"checkpointing": True}, "layerwise": {"layerwise": True}}


def build():
    return build_llama(SHAPE, seed=0)
