"""A model that other programs change while it is trained.

What torch's own optimizer would follow is followed. Where a parameter would stand still without a word, or be stepped with
moments of another size, the next step is an error that names the parameter and says what to do.
"""

from __future__ import annotations

from torch import Tensor, nn

from lingrad.adapters import is_attached
from lingrad.engine.run import Run
from lingrad.errors import ModeError


def refuse_lost(run: Run) -> None:
    """Make sure that whatever has a gradient, or should have one, is what this run trains.

    It costs next to nothing where every parameter of the run has a gradient and none was frozen when the run was made.

    Args:
        run: The run, with the gradients of a step.

    Raises:
        ModeError: A parameter that was frozen has a gradient; or the model has another parameter in place of one that is
            trained.
    """
    if run.model is None:
        return
    for name, param in run.frozen:
        if param.grad is not None and param.requires_grad and not is_attached(param):
            raise ModeError(
                f"{name} was frozen when lingrad was called, has a gradient now, and is not in this optimizer, so it would not "
                "be trained. Freeze it again; or call lingrad while it is trainable, and freeze it then until it is to train"
            )
    idle = [named for named in run.named() if named.param.grad is None and named.param.requires_grad]
    if run.layerwise is not None:
        idle = [named for named in idle if not run.layerwise.was_stepped(named.param)]
    if not idle:
        return
    own = {id(named.param) for named in run.named()}
    for named in idle:
        current = _at(run.model, named.name)
        if current is None or not current.requires_grad or id(current) in own or is_attached(current):
            continue
        if named.attachment is None or not named.attachment.holds(current):
            raise ModeError(
                f"{named.name} is another parameter now than the one that this optimizer trains (a layer was replaced, or "
                "load_state_dict was called with assign=True), so it would not be trained. Load without assign=True; or call "
                "detach(), change the model, and call lingrad again"
            )


def _at(model: nn.Module, name: str) -> Tensor | None:
    """The parameter that a model holds under a name; None where there is no such layer, or it computes the tensor."""
    *path, attribute = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = None if module is None else module._modules.get(part)
    return None if module is None else module._parameters.get(attribute)
