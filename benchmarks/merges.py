"""What merges into 16-bit weights lose and take, exact and fast: ``python -m benchmarks.merges`` (ten minutes).

First merges alone, compared with the sum in float64; then a small Llama with bfloat16 weights, trained with either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

import lingrad
from benchmarks.lowbit import SHAPE, shown, table, train, validate
from lingrad import LinearMap
from lingrad.models import build_llama
from lingrad.transforms import SVD, Sides

CASES = (  # dtype, m = n, rank
    (torch.bfloat16, 1024, 128),
    (torch.bfloat16, 2048, 512),
    (torch.float16, 1024, 128),
    (torch.float32, 1024, 128),
    (torch.float32, 1024, 16),
)
MERGES = 200
SIZE = 1e-3  # of an update, as a share of the weight's norm
SPEC, LR, STEPS, SEEDS = "svd(rank=16, every=50)", 2e-3, 120, (0, 1, 2)


def split(smap: LinearMap, weight: Tensor, coords: Tensor) -> None:
    """A merge with z as the sum of two numbers of 16 bits each: twice the operations of a fast one. Not part of lingrad."""
    (basis,) = smap.tensors
    high = coords.to(weight.dtype)
    low = (coords - high).to(weight.dtype)
    weight.addmm_(torch.cat((high, low), 1), torch.cat((basis, basis), 1).t())


def exact(smap: LinearMap, weight: Tensor, coords: Tensor) -> None:
    """The merge of optimizer mode, but for 16-bit weights on a GPU."""
    smap.add_lift_(weight, coords)


WAYS: dict[str, Callable[[LinearMap, Tensor, Tensor], None]] = {
    "exact": exact,
    "fast": lambda smap, weight, coords: smap.add_rounded_lift_(weight, coords),
    "z in two parts": split,
}
FULL_PRECISION = {"exact": exact, "compiled": torch.compile(exact)}  # compiled: a product into a temporary, and a copy


def merges(dtype: torch.dtype, size: int, rank: int, device: str) -> list[tuple[str, ...]]:
    """Rows of the first table: what one merge and many lose.

    Args:
        dtype: Of weight and basis.
        size: m and n.
        rank: The rank, of a right basis.
        device: Where.

    Returns:
        A row for each way.
    """
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, rank, generator=draw))[0].to(dtype).contiguous().to(device)
    smap = SVD(rank=rank, side="right").map(Sides(None, basis))
    start = (torch.randn(size, size, generator=draw) / size**0.5).to(dtype).to(device)
    ways = FULL_PRECISION if dtype == torch.float32 else WAYS
    weights, total = {way: start.clone() for way in ways}, start.double()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cells = {way: [str(dtype).removeprefix("torch."), f"{size} x {size}", str(rank), way] for way in ways}
    for done in range(MERGES):
        coords = torch.randn(size, rank, generator=draw).to(device)
        coords *= SIZE * start.float().norm() / smap.lift(coords).norm()
        total += smap.lift(coords.double())
        for way, add in ways.items():
            began = moment(device)
            add(smap, weights[way], coords)
            seconds[way].append(moment(device) - began)
        if done in (0, MERGES - 1):
            for way, weight in weights.items():
                error = (weight.double() - total).norm() / (total - start.double()).norm()
                differing = (weight != weights["exact"]).double().mean()
                cells[way] += [f"{error:.5f}", f"{differing:.3%}" if way != "exact" else "-"]
    return [(*cells[way], f"{1e3 * median(seconds[way]):.2f}") for way in ways]


def moment(device: str) -> float:
    """The time, once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def losses() -> list[tuple[str, ...]]:
    """Rows of the second table: losses on text that was not trained on."""
    rows = []
    for label, dtype, options in (
        ("float32", torch.float32, {}),
        ('bfloat16, `merge="exact"`', torch.bfloat16, {"merge": "exact"}),
        ('bfloat16, `merge="fast"`', torch.bfloat16, {"merge": "fast"}),
    ):
        found = []
        for seed in SEEDS:
            model = build_llama(SHAPE, seed=seed).to(dtype)
            train(model, lingrad.wrap(model, SPEC, lr=LR, **options), STEPS, seed)
            found.append(validate(model.float()))
        rows.append((label, *(f"{loss:.4f}" for loss in found), shown(found)))
    return rows


def main() -> None:
    """Print both tables; the second is made on the CPU only."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merges", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    device = parser.parse_args().device
    header = ("weights", "m x n", "r", "merge", "error of one", "differ", f"error of {MERGES}", "differ", "ms")
    rows = [header, *(row for case in CASES for row in merges(*case, device))]
    sys.stdout.write(f"{table(rows)}\n\n")
    if device == "cpu":
        names = ("weights", *(f"seed {seed}" for seed in SEEDS), "mean")
        sys.stdout.write(f"{table([names, *losses()])}\n")


if __name__ == "__main__":
    main()
