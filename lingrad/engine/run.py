"""What a run keeps between steps, and how it is saved and loaded: the half of the optimizer that is not the step.

torch's own layout, so that trainers and torch.distributed.checkpoint work unmodified; entries: `lingrad.engine.checkpoint`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lingrad import optimizers
from lingrad.adapters import Attachment, Mode
from lingrad.engine import checkpoint
from lingrad.engine.arithmetic import Compat
from lingrad.engine.moments import Carry
from lingrad.errors import ModeError
from lingrad.subspaces.subspace import Subspace


class StatefulOptimizer(Optimizer):
    """The state of a run and its way to and from a checkpoint; `lingrad.SubspaceOptimizer` adds the step.

    Attributes:
        mode: ``optimizer`` or ``adapter``; None once detached.
        attachments: The connections to the model, one for each transformed weight; each has its ``sub``.
    """

    mode: Mode | None
    attachments: list[Attachment]

    _base: optimizers.Base
    _carry: Carry
    _seed: int
    _compat: Compat | None
    _stagger: bool
    _share: str | None
    _ledger: bool
    _self_contained: bool
    _keep_remainder: bool
    _step: int  # steps finished
    _base_state: defaultdict[Tensor, dict[str, Any]]  # what the stock optimizers keep; they share this mapping
    _by_coords: dict[int, Attachment]
    _places: dict[int, tuple[torch.dtype, torch.device]]  # of each parameter, as the base's memory of it last followed

    @property
    def subspaces(self) -> list[Subspace]:
        """The subspace of every transformed weight."""
        return [attachment.sub for attachment in self.attachments]

    def base_of(self, kind: str) -> optimizers.Base:
        """The base that steps the param groups of a kind: ``coords``, ``matrices`` or ``vectors``."""
        return self._base if kind == "coords" else self._base.rest or self._base

    def held(self) -> Iterator[tuple[Tensor, str]]:
        """The tensors that stay in memory between steps, for memory reports.

        Yields:
            (tensor, what it is): ``weight`` for those that are transformed, ``coords``, ``basis``, ``moments``.
        """
        for attachment in self.attachments:
            yield from ((tensor, "weight") for tensor in attachment.held())
            yield attachment.sub.coords, "coords"
            if attachment.sub.ledger is not None:
                yield from ((tensor, "coords") for tensor in attachment.sub.ledger.tensors())
            yield from ((tensor, "basis") for tensor in attachment.sub.tensors())
        for entries in self._base_state.values():
            yield from ((value, "moments") for value in entries.values() if isinstance(value, Tensor))

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """What the base and the subspaces keep, by parameter; a copy of the mapping, for reading.

        torch.distributed.checkpoint learns from it what a checkpoint holds.
        """
        merged = defaultdict(dict, {param: dict(entries) for param, entries in self._base_state.items()})
        if self._step or self._base_state:
            for attachment in self.attachments:
                merged[attachment.sub.coords].update(checkpoint.pack(attachment.sub, self._step, self._stored(attachment)))
        return merged

    @state.setter
    def state(self, value: defaultdict[Tensor, dict[str, Any]]) -> None:
        self._base_state = value

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout: ``state`` by index, with ``subspace.*`` beside the base's entries, and groups.

        Returns:
            Tensors and plain values only; loads with ``weights_only=True``.
        """
        self._require_attached()
        packed: dict[str, Any] = super().state_dict()
        for index, param in enumerate(self._params()):
            if id(param) in self._by_coords:
                attachment = self._by_coords[id(param)]
                own = checkpoint.pack(attachment.sub, self._step, self._stored(attachment))
                packed["state"].setdefault(index, {}).update(own)
        return packed

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; nothing is changed unless all of it fits.

        Args:
            state_dict: What `state_dict` gave, in the same mode. Raises `CheckpointError` where it belongs to other
                parameters or another spec, base, carry, seed or mode; the first difference is named.
        """
        self._require_attached()
        identity = self._identity()
        checkpoint.check_layout(state_dict)
        checkpoint.check_groups(state_dict["param_groups"], self.param_groups, identity)
        names = [name for group in self.param_groups for name in group["param_names"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        loaded = []
        for param, name, index in zip(self._params(), names, indices, strict=True):
            attachment = self._by_coords.get(id(param))
            entries = state_dict["state"].get(index, {})
            sub = None if attachment is None else attachment.sub
            base = self._base if sub is not None else self._base.rest or self._base
            stored = {} if attachment is None else self._stored(attachment)
            loaded.append((param, sub, stored, checkpoint.unpack(entries, param, name, sub, base, stored)))
        for param, sub, stored, found in loaded:
            self._base_state.pop(param, None)
            if found.moments:
                self._base_state[param] = found.moments
            if sub is not None and found.step is not None:
                sub.replace_state(found.state, found.refreshes)  # of one that is led there is none
                sub.merged, sub.ledger, sub.loss, sub.replaced = found.merged, found.ledger, found.loss, False
                for key, tensor in found.stored.items():
                    if tensor.data_ptr() != stored[key].data_ptr():  # as in accelerate's load_state_dict(state_dict())
                        stored[key].copy_(tensor)
                sub.coords.grad = None  # of weights and a basis that are gone
                self._step = found.step
        self._places = {id(param): (param.dtype, param.device) for param in self._params()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params" and key not in identity})
        for sub in self.subspaces:
            sub.schedule(self._step)  # a redraw that was due had happened before the state was saved

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError(
            "this optimizer is tied to its model by hooks and cannot be copied or pickled; "
            "save opt.state_dict() and model.state_dict(), and load them into a new model and optimizer"
        )

    def _require_attached(self) -> None:
        if self.mode is None:
            raise ModeError("this optimizer was detached from its model; call lingrad.wrap or lingrad.adapt again")

    def _identity(self) -> dict[str, Any]:
        """What this run is, for checkpoints to compare."""
        return {
            "format": checkpoint.FORMAT,
            "mode": self.mode,
            "base": self._base.name,
            "carry": self._carry,
            "seed": self._seed,
            "compat": self._compat,
            "stagger": self._stagger,
            "share": self._share,
            "ledger": self._ledger,
            "self_contained": self._self_contained,
            "keep_remainder": self._keep_remainder,
        }

    def _stored(self, attachment: Attachment) -> dict[str, Tensor]:
        """What of the model the state holds too: in adapter mode, where it is to be complete, coordinates and weights."""
        if not self._self_contained or self.mode != "adapter":
            return {}
        return {"coords": attachment.sub.coords.detach(), **attachment.stored()}

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _is_probe(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes a fresh optimizer allocate its state."""
        if self._step or self._base_state or any(float(group["lr"]) for group in self.param_groups):
            return False
        return not any(bool(param.grad.any()) for param in self._params() if param.grad is not None)

    def _follow(self, params: list[Tensor]) -> bool:
        """Cast and move the base's memory where model.to has cast or moved the parameter since the last step.

        Returns:
            Whether any was moved: which kernels a stock optimizer uses is a matter of the device.
        """
        moved = False
        for param in params:
            now = (param.dtype, param.device)
            dtype, device = self._places.setdefault(id(param), now)
            if (dtype, device) == now:
                continue
            self._places[id(param)] = now
            memory = self._base_state.get(param, {})
            base = self._base if id(param) in self._by_coords else self._base.rest or self._base
            fresh = base.memory(param) if memory else {}
            if device != param.device:
                memory.update(checkpoint.placed(memory, fresh, param.device))
            for key, value in memory.items():
                like = fresh.get(key)
                if isinstance(value, Tensor) and isinstance(like, Tensor) and value.dtype == dtype != like.dtype:
                    memory[key] = value.to(like.dtype)  # not every base keeps its memory in the parameter's dtype
            moved = moved or device != param.device
        return moved
