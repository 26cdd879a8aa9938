"""What a step sends between processes: ``python -m benchmarks.traffic`` (three minutes; two processes on this machine's CPUs).

Bytes that one process hands to collectives, counted in the dispatcher: of plain ``fully_shard`` with AdamW, and of runs of
lingrad. Linear layers alone are trained, so that reduced bytes are theirs. In brackets their share of the plain run's.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

import lingrad
from benchmarks import measure
from lingrad.console import markdown as tabulate
from lingrad.models import LlamaShape, build_llama, next_token_loss

KINDS = ("reduce", "gather", "broadcast")
SHAPE = LlamaShape(256, 128, 344, 2, 4, 64)
EVERY, STEPS, RANK = 3, 4, 32
PLAIN = "fully_shard, AdamW"


@dataclass(frozen=True)
class Run:
    """A run whose bytes are counted.

    Args:
        spec: The config string; empty for plain AdamW.
        mode: The mode.
        share: See `lingrad.wrap`.
    """

    spec: str
    mode: str = "optimizer"
    share: str | None = None

    @property
    def label(self) -> str:
        """Its name in the table."""
        return f"`{self.spec}`{', shared' if self.share else ''}, {self.mode} mode" if self.spec else PLAIN


RUNS = (
    Run(""),
    Run(f"random(rank={RANK}, every={EVERY})"),
    Run(f"random(rank={RANK}, every={EVERY}, side=right)"),
    Run(f"random(rank={RANK}, every={EVERY}, side=right)", "adapter"),
    Run(f"power(rank={RANK}, every={EVERY})"),
    Run(f"power(rank={RANK}, every={EVERY})", "adapter"),
    Run(f"power(rank={RANK}, every={EVERY}, side=right)", share="input"),
    Run(f"svd(rank={RANK}, every={EVERY}, solver=randomized)"),
    Run(f"svd(rank={RANK}, every={EVERY})"),
)


class Wire(TorchDispatchMode):
    """Bytes that this process hands to collectives.

    Attributes:
        sent: Kind -> bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = dict.fromkeys(KINDS, 0)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        kind = next((kind for kind in KINDS if kind in name), None)
        if "c10d" in name and kind is not None:
            # the input: the first argument of a functional collective, the second of those that write into their first
            given = args[0] if name.startswith("_c10d") or "allreduce" in name or "broadcast" in name else args[1]
            self.sent[kind] += sum(t.numel() * t.element_size() for t in tree_leaves(given) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def count(rank: int, world: int, run: Run, shape: LlamaShape = SHAPE) -> list[dict[str, int]]:
    """Train a few steps under ``fully_shard``.

    Args:
        rank: This process.
        world: The number of processes; their group exists.
        run: What trains.
        shape: The Llama's.

    Returns:
        For each step kind -> bytes that this process hands to collectives. Bases are refreshed in the first and the last.
    """
    from torch.distributed.fsdp import fully_shard

    model = build_llama(shape, seed=0)
    for name, param in model.named_parameters():
        param.requires_grad_("proj" in name)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer: torch.optim.Optimizer
    if run.spec:
        start = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[run.mode]
        optimizer = start(model, run.spec, lr=1e-3, share=run.share)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(shape.vocabulary, (world, shape.length), generator=draw)
        with Wire() as wire:
            optimizer.zero_grad()
            next_token_loss(model, ids[rank : rank + 1]).backward()
            optimizer.step()
        found.append(wire.sent)
    return found


def table(counted: Sequence[dict[str, Any]]) -> str:
    """The bytes of an ordinary step and of one that refreshes every basis, as Markdown; in kB."""
    rows = [("run", "reduced", "gathered", "at a refresh: reduced", "gathered", "broadcast")]
    plain = counted[0]["steps"][1]
    for found in counted:
        steps = found["steps"]
        ordinary, refresh = steps[1], steps[STEPS - 1]
        share = ordinary["reduce"] / plain["reduce"]
        cells = [f"{ordinary['reduce'] / 1e3:.1f} ({share:.3f})", f"{ordinary['gather'] / 1e3:.1f}"]
        cells += [f"{refresh[kind] / 1e3:.1f}" for kind in KINDS] if found["run"] != PLAIN else ["", "", ""]
        rows.append((found["run"], *cells))
    return tabulate(rows)


def worker(rank: int, world: int, folder: str) -> None:
    """What a process does: count all runs; the first one writes what it found.

    Args:
        rank: This process.
        world: The number of processes.
        folder: Where they meet.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    counted = []
    for run in RUNS:
        if rank == 0:
            measure.say(run.label)
        counted.append({"run": run.label, "steps": count(rank, world, run)})
    gc.collect()  # what holds the group is freed before it, as in lingrad.research.processes
    distributed.destroy_process_group()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(counted))


def compare() -> list[dict[str, Any]]:
    """Count all runs, on two processes of this machine's CPUs.

    Returns:
        For each run ``run``, its label, and ``steps``, what `count` gives; plain `fully_shard` first.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (2, folder), nprocs=2)  # type: ignore[no-untyped-call]
        found: list[dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())
    return found


def main() -> None:
    """Count, and print the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__).parse_args()
    sys.stdout.write(table(compare()))


if __name__ == "__main__":
    main()
