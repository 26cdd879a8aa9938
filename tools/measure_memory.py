"""Write the figures of docs/memory.md: ``python tools/measure_memory.py``; on a machine with a GPU first ``--gpu``."""

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lingrad import memory
from lingrad.memory import commands
from lingrad.memory.commands import Question
from lingrad.memory.units import readable
from lingrad.models import DTYPES, LLAMAS, LlamaShape, build_llama, open_model

ROOT = Path(__file__).parents[1]
PAGE, MEASURED = ROOT / "docs" / "memory.md", ROOT / "docs" / "memory_gpu.json"
GB = 10**9
SEVEN = {"model": "llama-7b", "rules": "svd(rank=1024)", "base": "adamw8bit", "layerwise": True}

MIDDLE = LlamaShape(32000, 1024, 2736, 8, 16, 1024)  # of the GaLore paper's 350M, 8 layers of it
METHODS = {
    "full SGD": memory.FullRank("sgd"),
    "full AdamW, fused": memory.FullRank("adamw"),
    "full AdamW, foreach": memory.FullRank("adamw", {"foreach": True}),
    "PEFT LoRA, rank 64": memory.Lora(64),
    "galore_torch, rank 256": memory.GaloreTorch(256),
    **{
        f"{mode} mode, {rules}, {base}": memory.Lingrad(rules, base, mode, {"lr": 1e-4})
        for rules, base in (("svd(rank=256)", "adamw"), ("power(rank=256)", "adamw8bit"), ("random(rank=256)", "sgd"))
        for mode in ("optimizer", "adapter")
    },
}
RECIPES = {"": {}, "checkpointing": {"checkpointing": True}, "layerwise": {"layerwise": True}}
# of 7B what a GPU of 80 GB can run in minutes: exact SVDs of its gradients take longer
LARGE = {
    f"7B: {mode} mode, power(rank=1024), adamw8bit": memory.Lingrad("power(rank=1024)", "adamw8bit", mode, {"lr": 1e-4})
    for mode in ("optimizer", "adapter")
}


def measure(path: Path) -> None:
    """Run every case on the GPU, simulate it as well, and write both to a file."""
    device = torch.cuda.get_device_name()
    cases = [(f"{label}{', ' if name else ''}{name}", MIDDLE, m, {"batch": 4, "length": 512, **recipe})
             for label, m in METHODS.items() for name, recipe in RECIPES.items()]  # fmt: skip
    cases += [(f"{label}, layerwise", LLAMAS["llama-7b"], m, {"batch": 1, "length": 256, "layerwise": True})
              for label, m in LARGE.items()]  # fmt: skip
    few = replace(MIDDLE, groups=4)
    cases += [(f"full AdamW, 4 of 16 heads for keys and values, {name}", few, METHODS["full AdamW, fused"],
               {"batch": 4, "length": 512, "dtype": DTYPES[name]}) for name in ("bfloat16", "float32")]  # fmt: skip
    rows = []
    for label, shape, method, options in cases:
        begin = time.perf_counter()
        options = {"dtype": torch.bfloat16, "device": "cuda", **options}

        build = partial(build_llama, shape, seed=0)
        measured, simulated = (run(build, method, **options) for run in (memory.measure, memory.simulate))
        row = {"label": label}
        for name, report in (("measured", measured), ("simulated", simulated)):
            row[name] = {key: getattr(report, key) for key in ("peak", "allocated", "reserved", "steady")}
        row["measured"]["untracked"] = measured.breakdown.get("untracked", 0)
        rows.append(row)
        gap = row["simulated"]["peak"] / row["measured"]["peak"] - 1
        print(f"{label:60} {readable(measured.peak):>12}  {gap:+.3%}  {time.perf_counter() - begin:.0f} s", flush=True)
        del measured, simulated
    versions = {"torch": torch.__version__, "python": platform.python_version(), "device": device}
    path.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


def gpu_table() -> str:
    """Simulated and measured figures, side by side."""
    if not MEASURED.is_file():
        return "No GPU has confirmed any figure on this page.\n"
    found = json.loads(MEASURED.read_text())
    lines = [
        f"On one {found['device']}, torch {found['torch']}: simulated / measured, in MiB.",
        "",
        "| run | asked for | apart | handed out | reserved |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        one, other = row["simulated"], row["measured"]
        both = [f"{one[key] / 2**20:,.1f} / {other[key] / 2**20:,.1f}" for key in ("peak", "allocated", "reserved")]
        lines.append(f"| {row['label']} | {both[0]} | {one['peak'] / other['peak'] - 1:+.2%} | {both[1]} | {both[2]} |")
    return "\n".join([*lines, "", apart(found)]) + "\n"


def apart(found: Mapping[str, Any]) -> str:
    """How far simulated and measured figures differ at most, as a sentence.

    Args:
        found: What `measure` has written.

    Returns:
        The sentence.
    """
    gaps = {
        key: [row["simulated"][key] / row["measured"][key] - 1 for row in found["rows"]]
        for key in ("peak", "allocated", "reserved")
    }
    most = max(abs(row["simulated"]["peak"] - row["measured"]["peak"]) for row in found["rows"])
    worst = {key: max(values, key=abs) for key, values in gaps.items()}
    middle = median(abs(value) for value in gaps["reserved"])
    return (
        f"Worst: {most} bytes of what was asked for, {worst['allocated']:+.2%} of what was handed out, "
        f"{worst['reserved']:+.1%} of what was reserved (half of the runs within {middle:.1%})."
    )


def seven_billion() -> str:
    """7B at rank 1024 with 8-bit moments, one row of 256 tokens, layerwise, against 24 GiB."""
    question = Question(**SEVEN, capacity="24GiB")
    lines = [
        "| method | asked for | between steps | reserved | 24 GiB | largest batch |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for method in commands.methods(question):
        report = commands.simulate(question, method)
        rows = commands.fit(question, method).rows if report.fits else 0
        verdict = "fits" if report.fits else "does not fit"
        cells = [method.label, readable(report.peak), readable(report.steady), readable(report.reserved), verdict, str(rows)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def eight_bits() -> str:
    """7B with linear weights in INT8, by Q-GaLore, one row of 2,048 tokens, against 16 GiB."""
    options = {"model": "llama-7b", "dtype": "int8", "length": 2048, "layerwise": True, "checkpointing": True}
    lines = ["| rules | asked for | between steps | reserved | 16 GiB |", "| --- | ---: | ---: | ---: | --- |"]
    for rules in ("q_galore(rank=1024)", "q_galore(rank=256)"):
        report = commands.simulate(Question(**options, rules=rules, capacity="16GiB"))
        cells = [f"`{rules}`", readable(report.peak), readable(report.steady), readable(report.reserved)]
        lines.append(f"| {' | '.join(cells)} | {'fits' if report.fits else 'does not fit'} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def offloaded() -> str:
    """7B at rank 1024 with moments of AdamW in full, layerwise, with and without offload."""
    lines = [
        "| mode | `offload` | asked for | on the device between steps | in host memory between steps |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for mode in ("optimizer", "adapter"):
        for words in (None, "moments", "moments, bases"):
            report = commands.simulate(Question(**SEVEN | {"base": "adamw"}, mode=mode, offload=words))
            host = sum(report.host.values())
            cells = [mode, f'`"{words}"`' if words else "", readable(report.peak), readable(report.steady)]
            lines.append(f"| {' | '.join(cells)} | {readable(host) if host else ''} |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def seventy_billion() -> str:
    """70B, the same, with checkpointing."""
    question = Question(**SEVEN | {"model": "llama-70b"}, length=2048, checkpointing=True)
    lines = ["| method | asked for | between steps | reserved |", "| --- | ---: | ---: | ---: |"]
    for method in (question.method, replace(question, mode="adapter").method):
        report = commands.simulate(question, method)
        lines.append(f"| {method.label} | {readable(report.peak)} | {readable(report.steady)} | {readable(report.reserved)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def optimizer_state(rules: str, base: str) -> int:
    """Bytes of the optimizer state of 7B: bases, and moments of all that trains."""
    totals = memory.estimate(open_model("llama-7b").to(torch.bfloat16), rules, base, lr=1e-4).totals
    return totals.get("basis", 0) + totals["moments"]


def headlines() -> str:
    """The paper's figures and those simulated here."""
    coded = [f"coded(each=svd(rank=1024), bits={bits})" for bits in (8, 4)]
    galore8, *bits, full8 = (optimizer_state(rules, "adamw8bit") for rules in ("svd(rank=1024)", *coded, "full()"))
    bf16 = 2 * 2 * 6_738_415_616  # two moments of bfloat16
    question = Question(**SEVEN)
    _, galore, optimizer, adapter, _ = commands.methods(question)
    reports = [commands.simulate(question, method) for method in (galore, optimizer, adapter)]
    full = commands.simulate(replace(question, layerwise=False), memory.FullRank("adamw"))
    peaks, taken = ([getattr(r, key) / GB for r in reports] for key in ("peak", "reserved"))
    rows = [
        (
            "65.5 % less optimizer state (7B, rank 1024, 8-bit GaLore against 8-bit Adam)",
            "; ".join(f"{1 - state / full8:.1%}" for state in (galore8, *bits)),
            f"{galore8 / GB:.2f} GB (bases in bfloat16, 8-bit moments) against {full8 / GB:.2f} GB; "
            f"{bits[0] / GB:.2f} GB with bases in 8 bits and {bits[1] / GB:.2f} GB in 4, `coded(...)`",
        ),
        (
            "82.5 % less optimizer state (8-bit GaLore against BF16 Adam)",
            "; ".join(f"{1 - state / bf16:.1%}" for state in (galore8, *bits)),
            f"the same three against {bf16 / GB:.2f} GB, two moments of bfloat16",
        ),
        (
            "63.3 % less in all (8-bit GaLore, layerwise, against BF16 Adam; 256 tokens)",
            f"{1 - peaks[0] / (full.peak / GB):.1%}",
            f"galore_torch's {peaks[0]:.1f} GB against {full.peak / GB:.1f} GB, asked for at the peak (published: 22.0, 59.9)",
        ),
        (
            "22.0 GB in all (the same run)",
            " / ".join(f"{peak:.1f}" for peak in peaks) + " GB",
            "galore_torch / optimizer mode / adapter mode, asked for; reserved "
            + " / ".join(f"{n:.1f}" for n in taken)
            + " GB, to which the CUDA context comes",
        ),
    ]
    lines = ["| published | here | what is counted |", "| --- | ---: | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


# Table 2 of the GaLore paper (arXiv 2403.03507): rank, and gigabytes of weights and optimizer state in BF16
# for full rank, GaLore and LoRA
PAPER = {
    "llama-60m": (128, 0.36, 0.24, 0.36),
    "llama-130m": (256, 0.76, 0.52, 0.80),
    "llama-350m": (256, 2.06, 1.22, 1.76),
    "llama-1b": (512, 7.80, 4.38, 6.17),
}


def papers_table() -> str:
    """The paper's memory estimates and exact counts by its convention: weights and optimizer state in bfloat16."""
    lines = [
        "| model, rank | full: published / exact | GaLore: published / exact | LoRA: published / exact / embeddings twice |",
        "| --- | ---: | ---: | ---: |",
    ]
    gib = 2**30
    for name, (rank, *published) in PAPER.items():
        model = open_model(name)
        estimate = memory.estimate(model, f"svd(rank={rank})")
        bases = estimate.totals["basis"] // 4
        projections = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
        factors = sum(rank * sum(p.shape) for p in projections)
        rest = estimate.parameters - sum(p.numel() for p in projections)
        exact = (
            2 * 3 * estimate.parameters / gib,
            2 * (estimate.parameters + bases + 2 * estimate.trained) / gib,
            2 * (estimate.parameters + factors + 2 * (factors + rest)) / gib,
        )
        cells = [f"{said:.2f} / {counted:.2f}" for said, counted in zip(published, exact, strict=True)]
        twice = exact[2] + 2 * rest / gib
        lines.append(f"| {name}, {rank} | {' | '.join(cells)} / {twice:.2f} |")
    return "\n".join(lines) + "\n"


SECTIONS = {
    "gpu": gpu_table,
    "7b": seven_billion,
    "int8": eight_bits,
    "offload": offloaded,
    "70b": seventy_billion,
    "headlines": headlines,
    "paper": papers_table,
}


def main() -> None:
    """Fill the tables of the page, or measure on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", type=Path, metavar="FILE", help=f"measure on this machine's GPU into FILE ({MEASURED.name})")
    parser.add_argument("--only", choices=sorted(SECTIONS), help="one table")
    options = parser.parse_args()
    if options.gpu is not None:
        measure(options.gpu)
        return
    page = PAGE.read_text()
    for name, make in SECTIONS.items():
        if options.only in (None, name):
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            if not pattern.search(page):
                sys.exit(f"{PAGE} has no marks for '{name}'")
            before, rest = pattern.search(page).span(1)[1], pattern.search(page).span(2)[0]
            page = page[:before] + make() + page[rest:]
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
