"""``python -m benchmarks``: run a plan, write its results, or put the last ones into the docs."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks import docs, host, measure, memory, refreshes, report, steps, traffic
from benchmarks.plan import (
    ADAPTER,
    COMPILED,
    COUNTED,
    FROZEN,
    FULL,
    GALORE,
    LLAMA_1024,
    LORA_ONE,
    OPTIMIZER,
    PLANS,
    SHARED,
    Plan,
)
from lingrad.errors import LingradError

SUITES = ("steps", "refreshes", "pca", "memory", "overhead", "host", "compiled", "policies", "traffic", "curves")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small plan: under four minutes on two cores")
    parser.add_argument("--plan", choices=sorted(PLANS), help="the plan; full by default")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, help="some suites of the plan")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/out by default")
    parser.add_argument("--docs", action="store_true", help="run nothing; put the last results into docs/performance.md")
    chosen = parser.parse_args()
    if chosen.docs:
        docs.into_docs()
        return
    name = chosen.plan or ("quick" if chosen.quick else "full")
    started = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning)
    found = run(PLANS[name], chosen.only, chosen.device)
    found |= {"plan": name, "device": chosen.device, "machine": report.machine(chosen.device)}
    found["seconds"] = time.perf_counter() - started
    report.save(found, chosen.out or (report.OUT / f"plan-{chosen.device}" if chosen.device != "cpu" else report.OUT))
    sys.stdout.write(report.markdown(found))


def run(plan: Plan, only: Any, device: str) -> dict[str, Any]:
    """Measure all suites of a plan that were asked for.

    Args:
        plan: The plan.
        only: The suites.
        device: Where.

    Returns:
        Plain values, by suite, with ``figures`` for the goals.
    """
    found: dict[str, Any] = {"steps": {}, "refreshes": [], "curves": {}}
    figures: dict[str, float] = {}
    for comparison in plan.steps if "steps" in only else ():
        timings = steps.compare(comparison, device)
        found["steps"][comparison.workload.name] = steps.plain(timings)
        if comparison.workload.name == LLAMA_1024.name or plan.name == "quick":
            figures |= step_figures(timings)
    for capture in plan.refreshes if "refreshes" in only else ():
        measured = refreshes.compare(capture, plan.rounds, device)
        found["refreshes"] += refreshes.plain(measured)
        new = refreshes.figures(measured)
        if "power energy" in figures and "power energy" in new:
            new["power energy"] = min(new["power energy"], figures["power energy"])
        figures |= new
    if "pca" in only:
        found["pca"] = refreshes.pca(plan.rounds, device)
        figures["pca/autograd"] = measure.ratio(found["pca"]["ours"], found["pca"]["autograd"]).middle
    if "memory" in only and plan.memory is not None:
        found["memory"] = memory.compare(plan.memory)
        found["saved"] = memory.saved(plan.memory)
        figures["memory"] = found["memory"][OPTIMIZER]["beyond"] / found["memory"][GALORE]["beyond"]
        figures["saved"] = found["saved"]["share"]
    if "overhead" in only:
        found["overhead"] = steps.overhead(plan.overhead, max(plan.rounds, 11), device)
        figures["overhead"] = found["overhead"]["share"]
    if "host" in only:
        found["host"] = host.eager(plan.host, COUNTED, 8 * plan.rounds)
        found["host, compiled"] = host.compiled(plan.host, COMPILED, 8 * plan.rounds)
    if "compiled" in only and plan.compiled is not None:
        found["compiled"] = host.compiled(plan.compiled, COMPILED, plan.rounds)
    if "policies" in only and plan.policies is not None:
        found["policies"] = steps.plain(steps.compare(plan.policies, device))
    if "traffic" in only:
        found["traffic"] = traffic.compare()
    for what, comparisons in plan.curves if "curves" in only else ():
        found["curves"][what] = [
            {
                "workload": report.described(comparison.workload),
                "steps": steps.plain(steps.compare(comparison, device)),
            }
            for comparison in comparisons
        ]
    return found | {"figures": figures}


def step_figures(timings: dict[str, steps.Timing]) -> dict[str, float]:
    """The goals that whole steps answer, each with the ratio of the two methods' operations."""
    pairs = {
        "optimizer/full": (OPTIMIZER, FULL),
        "optimizer/galore_torch": (OPTIMIZER, GALORE),
        "optimizer/frozen": (OPTIMIZER, FROZEN),
        "shared/full": (SHARED, FULL),
        "shared/galore_torch": (SHARED, GALORE),
        "shared/frozen": (SHARED, FROZEN),
        "adapter/lora": (ADAPTER, LORA_ONE),
        "adapter, shared/lora": ("adapter, shared", LORA_ONE),
    }
    found = {}
    for name, (a, b) in pairs.items():
        if a in timings and b in timings:
            found[name] = measure.ratio(timings[a].spread, timings[b].spread).middle
            found[f"{name} operations"] = timings[a].flops / timings[b].flops
    return found


if __name__ == "__main__":
    try:
        main()
    except LingradError as error:
        sys.exit(f"benchmarks: {error}")
