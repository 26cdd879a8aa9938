"""What is said where most of a model is stepped in full and nobody asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from lingrad.config import spec
from lingrad.config.targets import Plan
from lingrad.console import layers
from lingrad.transforms.experts import Experts

SHARE = 0.5  # of the elements of a model's matrices
NAMED = 3  # parameters that are named, of those that are stepped in full


def remark(plans: Sequence[Plan]) -> str:
    """One line where more than half of the elements of a model's matrices are stepped in full unasked.

    Matrices are trainable parameters with two or more dimensions, apart from embeddings and the output head, which a config
    string leaves out by itself and which make up most of a small model. What a rule says ``none`` of was asked for: it counts
    among the matrices, and not among those that nobody asked to step in full.

    Args:
        plans: What happens to the parameters, one plan for each param group.

    Returns:
        The line: the numbers, the largest such parameters, and the rule to write; empty where there is nothing to say.
    """
    transformed = sum(prod(target.layout.shape) for plan in plans for target in plan.targets)
    sizes = {name: param.numel() for plan in plans for name, param in plan.full}
    asked = sum(sizes[name] for plan in plans for name in plan.none)
    patterns: dict[str, int] = {}
    fused: set[str] = set()
    for name, experts in (item for plan in plans for item in plan.unasked.items()):
        patterns[layers(name)] = patterns.get(layers(name), 0) + sizes[name]
        fused |= {layers(name)} if experts else set()
    count = sum(patterns.values())
    total = transformed + asked + count
    if count <= SHARE * total:
        return ""
    largest = sorted(patterns, key=lambda pattern: -patterns[pattern])[:NAMED]
    shown = ", ".join(f"'{pattern}' ({patterns[pattern]:,})" for pattern in largest)
    transform = _example(plans)
    rule = f"{{'{largest[0]}': '{f'experts(each={transform})' if largest[0] in fused else transform}', ...}}"
    return (
        f"{count:,} of the {total:,} elements of the model's matrices ({count / total:.1%}; no embeddings, no output head) "
        f"are stepped in full, and no rule asks for it; most are in {shown}. Name them in the "
        f"rules to transform them: {rule}; 'none' instead trains them in full without this line"
    )


def _example(plans: Sequence[Plan]) -> str:
    transform = next((target.transform for plan in plans for target in plan.targets), None)
    if transform is None:
        return "svd(rank=8)"
    return spec.format(transform.each if isinstance(transform, Experts) else transform)
