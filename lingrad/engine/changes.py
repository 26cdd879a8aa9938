"""What a run has made of its weights."""

from __future__ import annotations

from lingrad.engine.run import Run
from lingrad.errors import ModeError
from lingrad.subspaces.ledger import Change


def changes(run: Run) -> dict[str, Change]:
    """What a run has made of every transformed weight, as thin factors.

    Args:
        run: The run.

    Returns:
        Parameter name -> change.

    Raises:
        ModeError: It is not known, or of no low rank.
    """
    residual = run.settings.residual
    if residual is not None and run.step:
        raise ModeError(
            f"with residual='{residual}' weights change outside of the span of their bases too, and no thin factors hold the "
            "change; save the model itself, or have lingrad convert cut the difference of two models to a rank"
        )
    found = {}
    for named in run.named():
        if named.attachment is not None:
            found[named.name] = named.attachment.sub.change(decays=bool(named.group["weight_decay"]))
    return found
