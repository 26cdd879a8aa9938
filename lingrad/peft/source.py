"""What is exported: a run, or a model and what was made of its weights; seen through one set of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.adapters import Attachment
from lingrad.adapters.base import Coords
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import DataError, ExportError, ModeError
from lingrad.maps import KroneckerMap, SelectionMap
from lingrad.maps.factors import Factors
from lingrad.peft.bare import plain_copy, refuse_peft
from lingrad.peft.slots import Basis
from lingrad.subspaces.ledger import Change
from lingrad.weights.bitsandbytes import is_packed, packed_of
from lingrad.weights.layout import layout_of

Changes = Mapping[str, Change | Factors]
Exported = SubspaceOptimizer | tuple[nn.Module, Changes]


@dataclass(frozen=True)
class Source:
    """A trained model and what was made of its weights.

    Args:
        model: The trained model as it runs.
        plain: Its plain copy, which shares its memory.
        changes: Parameter -> factors of its change, where there are any.
        kept: Parameter -> what decay has left of its start.
        trained: Parameter -> its value now, of those that were trained in full.
        bases: Parameter -> which factor of its change is a basis.
        attachments: Parameter -> its connection, in a run.
    """

    model: nn.Module
    plain: nn.Module
    changes: dict[str, Factors]
    kept: dict[str, float]
    trained: dict[str, Tensor]
    bases: dict[str, Basis]
    attachments: dict[str, Attachment]

    @torch.no_grad()
    def now(self, name: str) -> Tensor:
        """The weight as it is trained now, not rounded to its dtype after the last merge."""
        attachment = self.attachments.get(name)
        if attachment is None:
            return dense(self.model, name)
        return attachment.sub.effective(torch.float64)

    def rounded(self, name: str) -> Tensor:
        """The weight as the forward has it."""
        attachment = self.attachments.get(name)
        return dense(self.model, name) if attachment is None else attachment.sub.effective()

    def start(self, name: str) -> Tensor | None:
        """The weight the run started from, where the run still has it."""
        attachment = self.attachments.get(name)
        if attachment is None or attachment.sub.ledger.merged or self.kept.get(name, 1.0) != 1.0:
            return None
        return attachment.sub.weight.dense()

    def rebuilt(self, name: str) -> Tensor:
        """The weight the run started from as its change tells it, to rounding."""
        now, like = self.now(name).double(), self.plain.get_parameter(name)
        factors = self.changes[name].to(dtype=torch.float64, device=now.device)
        change = layout_of(like, self.plain.get_submodule(name.rpartition(".")[0]), name).restore(factors.dense())
        return ((now - change) / self.kept[name]).to(like.dtype)


def dense(model: nn.Module, name: str) -> Tensor:
    """A weight of a plain model as numbers, dequantised where it is held in 4 or 8 bits."""
    module = model.get_submodule(name.rpartition(".")[0])
    return packed_of(module, name).dense() if is_packed(module) else model.get_parameter(name).detach()


def open_source(what: Exported) -> Source:
    """Look at what was given to be exported.

    Args:
        what: A run; or the trained model, plain, with the changes of its weights.

    Returns:
        The source.

    Raises:
        ExportError: There is no plain model to be had from it.
        ModeError: The run was detached, or has not kept its changes.
    """
    if isinstance(what, SubspaceOptimizer):
        return _of_run(what)
    if not (isinstance(what, tuple) and len(what) == 2 and isinstance(what[0], nn.Module) and isinstance(what[1], Mapping)):
        raise ExportError(
            "expected a lingrad optimizer, or the trained model and its changes as a pair (model, changes), not "
            f"{type(what).__name__}"
        )
    model, changes = what
    refuse_peft(model, "export")
    if any(isinstance(module, Coords) for module in model.modules()):
        raise ExportError("the model is wrapped by lingrad; pass its optimizer, or detach() that and pass (model, changes)")
    found = {name: change if isinstance(change, Factors) else change.factors for name, change in changes.items()}
    kept = {name: 1.0 if isinstance(change, Factors) else change.decay for name, change in changes.items()}
    plain = plain_copy(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and n not in changes}
    return Source(model, plain, _some(found), kept, trained, {}, {})


def open_base(base: str | Path | nn.Module, like: nn.Module) -> nn.Module:
    """The model that a run started from.

    Args:
        base: Its folder, or the model itself, which is not written to.
        like: The plain model of the run.

    Returns:
        A plain copy, on the device of ``like``.

    Raises:
        DataError: The folder cannot be read as a model of this kind.
        ExportError: Its parameters are not those of the run's model.
    """
    if isinstance(base, nn.Module):
        refuse_peft(base, "a comparison with the base")
        found = plain_copy(base)
    else:
        found = _from_folder(Path(base), like)
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)} for model in (found, like)]
    wrong = [name for name in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        was, now = (found.get(wrong[0], "absent") for found in shapes)
        raise ExportError(f"the base is another model: '{wrong[0]}' is {was} in it, and {now} in the run")
    return found


def _of_run(optimizer: SubspaceOptimizer) -> Source:
    model = optimizer.model
    if model is None:
        raise ExportError(
            "the run was given parameters, not a model, and an adapter's form depends on its modules; pass the pair "
            "(model, opt.changes())"
        )
    if optimizer.mode is None:
        raise ModeError("this optimizer was detached from its model; export before detach()")
    refuse_peft(model, "export")
    found = optimizer.changes()
    attachments = {attachment.sub.name: attachment for attachment in optimizer.attachments}
    named = [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]
    trained = {name: param.detach() for name, param in named if name not in attachments}
    plain = plain_copy(model, optimizer.attachments, optimizer.mode)
    bases = {name: basis for name, attachment in attachments.items() if (basis := _basis(attachment)) is not None}
    factors = _some({name: change.factors for name, change in found.items()})
    kept = {name: change.decay for name, change in found.items()}
    return Source(model, plain, factors, kept, trained, bases, attachments)


def _some(changes: Mapping[str, Factors | None]) -> dict[str, Factors]:
    return {name: factors for name, factors in changes.items() if factors is not None and factors.rank}


def _basis(attachment: Attachment) -> Basis | None:
    """Which of the two factors of a change is the basis, where there is one basis."""
    found = attachment.sub.map()
    if isinstance(found, KroneckerMap):
        has_left, has_right = found.left is not None, found.right is not None
    elif isinstance(found, SelectionMap):
        has_left, has_right = found.rows is not None, found.columns is not None
    else:
        return None
    return None if has_left == has_right else "left" if has_left else "right"


def _from_folder(folder: Path, like: nn.Module) -> nn.Module:
    load: Any = getattr(type(like), "from_pretrained", None)
    if load is None:
        raise DataError(f"a {type(like).__name__} cannot be read from a folder; pass the base model itself: base=model")
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'; expected the model that the run started from, in transformers' form")
    dtypes = {p.dtype for p in like.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "auto"
    try:  # of what can be wrong in a folder every library it passes through has its own error
        found: nn.Module = load(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except Exception as error:
        raise DataError(f"'{folder}' cannot be read as a {type(like).__name__}: {error}") from error
    found.requires_grad_(False)
    return found.eval().to(next(like.parameters()).device)
