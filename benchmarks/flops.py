"""Floating-point operations of a step, as torch's own counter counts them, with the operators it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

aten: Any = torch.ops.aten
Shape = Sequence[int]


def _into(target: Shape, a: Shape, b: Shape, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two products: the scores, and what they weigh."""
    return 2 * 2 * prod(query) * key[-2]


def _attention_backward(grad: Shape, query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Five products: the scores once more, and the gradients of scores, queries, keys and values."""
    return 5 * 2 * prod(query) * key[-2]


# torch's counter knows neither products that are added in place nor the CPU's attention kernels
MISSING = {
    aten.addmm_: _into,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **{op: shape_wrapper(formula) for op, formula in MISSING.items()}}


def of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of the products in one call of an operator.

    Args:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its result.

    Returns:
        Their number; 0 for an operator without products. Attention with a causal mask counts half.
    """
    formula = FORMULAS.get(func._overloadpacket)
    if formula is None:
        return 0
    found = int(formula(*args, **kwargs, out_val=out))
    names = [argument.name for argument in func._schema.arguments]
    causal = kwargs.get("is_causal", args[names.index("is_causal")] if "is_causal" in names[: len(args)] else False)
    return found // 2 if causal else found


def count(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in some work; a multiplication and an addition are two.

    Args:
        work: What to run.

    Returns:
        Their number. Factorisations and elementwise operations are not counted.
    """
    with FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
        work()
    return int(counter.get_total_flops())
