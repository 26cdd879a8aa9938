"""What can be trained where each process holds some rows of every weight (``fully_shard``)."""

from __future__ import annotations

from lingrad.config.targets import Target
from lingrad.errors import ModeError, SpecError, require
from lingrad.weights.layout import is_conv1d


def check_target(target: Target) -> None:
    """Make sure that a target is the weight of one linear layer, [out, in].

    Args:
        target: The target.

    Raises:
        ModeError: It is another one.
    """
    if target.route != "projected" or is_conv1d(target.owners[0][0]):
        raise ModeError(
            f"{target.name} is sharded and not the weight of one linear layer (an embedding, a convolution, GPT-2's Conv1D, "
            "fused experts, a tied weight); only linear layers are trained in a subspace under fully_shard and "
            "tensor parallelism. Leave it out by a rule: 'none'"
        )


def check_cut(base: str, *, coded: bool, layerwise: bool | str, offload: str | None) -> None:
    """Refuse options that a run of cut weights does not support.

    Args:
        base: The name of the base of the coordinates.
        coded: Whether its moments are stored as 8-bit codes.
        layerwise: Whether weights are stepped inside the backward.
        offload: What is in host memory between steps.

    Raises:
        SpecError: Moments are coded in blocks, which shards would cut; weights are stepped inside the backward; some of the
            state is offloaded.
    """
    require(
        not coded and base != "adamw8bit",
        "moments",
        "8-bit moments are coded in blocks of 256, which the shards of a weight cut in other places for each number of "
        "processes; leave them out: each process holds its part of the moments only",
    )
    require(
        offload is None,
        "offload",
        f"offload='{offload}' copies tensors of one process, and the moments of a sharded weight are spread over all of them; "
        "leave it out: each process holds its part only",
    )
    if layerwise:
        does = "steps" if layerwise is True else "refreshes"
        raise SpecError(
            f"layerwise={layerwise!r} {does} weights in the order in which gradients arrive, which is not the same in every "
            "process of a sharded run; leave it out (fully_shard frees gathered gradients layer by layer itself)",
            option="layerwise",
        )
