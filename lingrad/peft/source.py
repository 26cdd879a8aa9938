"""What is exported, behind one interface: a run, or a trained model and the changes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.adapters import Attachment
from lingrad.adapters.base import Coords
from lingrad.config.spec import format as format_spec
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import DataError, ExportError, ModeError
from lingrad.maps import KroneckerMap, SelectionMap
from lingrad.maps.factors import Factors
from lingrad.peft.bare import bare_copy, refuse_peft
from lingrad.peft.slots import FactorSide
from lingrad.subspaces.ledger import Change
from lingrad.weights.bitsandbytes import packed_of
from lingrad.weights.layout import is_packed, layout_of

Changes = Mapping[str, Change | Factors]
Exported = SubspaceOptimizer | tuple[nn.Module, Changes]


@dataclass(frozen=True)
class ExportSource:
    """A trained model and the changes of its weights.

    Args:
        model: The trained model, with lingrad's attachments.
        bare: A copy without them, which shares its memory.
        changes: Parameter -> factors of its change, where there are any.
        decay: Parameter -> the factor by which weight decay has multiplied its starting value.
        trained: Parameter -> its value now, of those that were trained in full.
        bases: Parameter -> on which side of its change the basis is.
        attachments: Parameter -> its attachment, in a run.
        transforms: Config strings of a run's bases.
    """

    model: nn.Module
    bare: nn.Module
    changes: dict[str, Factors]
    decay: dict[str, float]
    trained: dict[str, Tensor]
    bases: dict[str, FactorSide]
    attachments: dict[str, Attachment]
    transforms: tuple[str, ...] = ()

    @torch.no_grad()
    def now(self, name: str) -> Tensor:
        """The trained weight, not rounded to its dtype after the last merge."""
        attachment = self.attachments.get(name)
        if attachment is None:
            return dense(self.model, name)
        return attachment.sub.effective(torch.float64)

    def rounded(self, name: str) -> Tensor:
        """The weight as the forward uses it."""
        attachment = self.attachments.get(name)
        return dense(self.model, name) if attachment is None else attachment.sub.effective()

    def start(self, name: str) -> Tensor | None:
        """The starting weight, where the run still has it."""
        attachment = self.attachments.get(name)
        if attachment is None or attachment.sub.ledger.merged or self.decay.get(name, 1.0) != 1.0:
            return None
        return attachment.sub.weight.dense()

    def rebuilt(self, name: str) -> Tensor:
        """The starting weight, computed as the trained one minus its change; exact to rounding."""
        now, param = self.now(name).double(), self.bare.get_parameter(name)
        factors = self.changes[name].to(dtype=torch.float64, device=now.device)
        change = layout_of(param, self.bare.get_submodule(name.rpartition(".")[0]), name).restore(factors.dense())
        return ((now - change) / self.decay[name]).to(param.dtype)


def dense(model: nn.Module, name: str) -> Tensor:
    """A weight of a plain model, dequantised where it is stored in 4 or 8 bits."""
    module = model.get_submodule(name.rpartition(".")[0])
    return packed_of(module, name).dense() if is_packed(module) else model.get_parameter(name).detach()


def open_source(what: Exported) -> ExportSource:
    """Open what was given to be exported.

    Args:
        what: A run; or the trained plain model and the changes of its weights.

    Returns:
        The source.

    Raises:
        ExportError: It is something else, or no plain model can be made from it.
        ModeError: The run was detached, or has not recorded its changes.
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
    decay = {name: 1.0 if isinstance(change, Factors) else change.decay for name, change in changes.items()}
    bare = bare_copy(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and n not in changes}
    return ExportSource(model, bare, _with_factors(found), decay, trained, {}, {})


def open_start(start: str | Path | nn.Module, trained: nn.Module) -> nn.Module:
    """The model that a run started from.

    Args:
        start: Its folder, or the model itself, which is not written to.
        trained: The plain model of the run.

    Returns:
        A bare copy, on the device of ``trained``.

    Raises:
        DataError: The folder cannot be read as a model of this kind.
        ExportError: Its parameters are not those of the run's model.
    """
    if isinstance(start, nn.Module):
        refuse_peft(start, "a comparison with the starting model")
        found = bare_copy(start)
    else:
        found = _from_folder(Path(start), trained)
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)} for model in (found, trained)]
    wrong = [name for name in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        was, now = (found.get(wrong[0], "absent") for found in shapes)
        raise ExportError(f"the start given is another model: '{wrong[0]}' is {was} in it, and {now} in the run")
    return found


def _of_run(optimizer: SubspaceOptimizer) -> ExportSource:
    model = optimizer.model
    if model is None:
        raise ExportError(
            "the run was given parameters, not a model, and an adapter's form depends on its modules; pass the pair "
            "(model, opt.changes())"
        )
    if optimizer.mode is None:
        raise ModeError("this optimizer was detached from its model; export before detach()")
    refuse_peft(model, "export")
    if any(sub.weight.sharding is not None for sub in optimizer.subspaces):
        raise ExportError(
            "the model is sharded, and no process has all of it; have every process gather opt.changes() and a full state "
            "dict, and one of them pass the pair (model, changes), with the plain model that has that state"
        )
    found = optimizer.changes()
    attachments = {attachment.sub.name: attachment for attachment in optimizer.attachments}
    named = [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]
    trained = {name: param.detach() for name, param in named if name not in attachments}
    bare = bare_copy(model, optimizer.attachments, optimizer.mode)
    specs = tuple(dict.fromkeys(format_spec(sub.basis.transform) for sub in optimizer.subspaces))
    bases = {name: basis for name, attachment in attachments.items() if (basis := _basis(attachment)) is not None}
    factors = _with_factors({name: change.factors for name, change in found.items()})
    decay = {name: change.decay for name, change in found.items()}
    return ExportSource(model, bare, factors, decay, trained, bases, attachments, specs)


def _with_factors(changes: Mapping[str, Factors | None]) -> dict[str, Factors]:
    return {name: factors for name, factors in changes.items() if factors is not None and factors.rank}


def _basis(attachment: Attachment) -> FactorSide | None:
    """On which side of a change its basis is, where there is one basis."""
    found = attachment.sub.map()
    if isinstance(found, KroneckerMap):
        has_left, has_right = found.left is not None, found.right is not None
    elif isinstance(found, SelectionMap):
        has_left, has_right = found.rows is not None, found.columns is not None
    else:
        return None
    return None if has_left == has_right else "left" if has_left else "right"


def _from_folder(folder: Path, trained: nn.Module) -> nn.Module:
    load: Any = getattr(type(trained), "from_pretrained", None)
    if load is None:
        raise DataError(f"a {type(trained).__name__} cannot be read from a folder; pass the starting model: start=model")
    if not folder.is_dir():
        raise DataError(
            f"there is no folder '{folder}'; expected the starting model, as model.save_pretrained(folder) writes it"
        )
    dtypes = {p.dtype for p in trained.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "auto"
    try:
        found: nn.Module = load(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except Exception as error:  # each library that reads a part of the folder has its own errors
        raise DataError(f"'{folder}' cannot be read as a {type(trained).__name__}: {error}") from error
    found.requires_grad_(False)
    return found.eval().to(next(trained.parameters()).device)
