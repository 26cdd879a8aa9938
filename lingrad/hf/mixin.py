"""What needs a trainer of its own: metrics in the logs, lingrad's clipping, and adapters next to saved models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import ModeError, optional
from lingrad.hf.access import find_optimizer, metrics
from lingrad.hf.arguments import Factory
from lingrad.hf.folders import check_checkpoint, last_checkpoint
from lingrad.hf.renamed import load_renamed
from lingrad.hf.saving import save_adapter
from lingrad.hf.sharded import create_sharded, load_sharded, saves_shards, shards
from lingrad.tensors import whole

READY_MADE = {"LingradTrainer": ("transformers", "Trainer", "hf"), "LingradSFTTrainer": ("trl", "SFTTrainer", "trl")}

_Trainer: Any = object  # whatever comes after this class in a trainer's bases


class TrainerMixin(_Trainer):  # type: ignore[misc]
    """To be put before a trainer's class: ``class MyTrainer(lingrad.hf.TrainerMixin, Trainer)``.

    - ``lingrad/*`` in the logs of training; see `lingrad.hf.metrics`.
    - ``max_grad_norm`` clips as ``opt.clip_grad_norm_`` does: on a refresh step by the norm in the new basis.
    - ``save_model`` in adapter mode writes the plain model, and in ``adapter/`` a PEFT adapter that reproduces it.
    - ``train(resume_from_checkpoint=True)`` uses the last complete checkpoint; a broken one is refused with the reason.
    - A model quantized by bitsandbytes is accepted, although it has no PEFT adapter.

    With another optimizer it changes nothing.

    Attributes:
        adapter_in_checkpoints: Whether checkpoints get an adapter too, not only what ``save_model`` writes.
        adapter_options: Options of `lingrad.peft.export`: ``{"start": "folder"}``, the model the run started from.
    """

    adapter_in_checkpoints: bool = False
    adapter_options: Mapping[str, Any] = MappingProxyType({})

    _writes_adapter = False
    _no_adapter = ""  # why there can be none

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        given = kwargs.pop("optimizer_cls_and_kwargs", None)  # not every trainer's class passes it on
        with quantized_allowed(model):
            super().__init__(model, *args, **kwargs)
        if given is not None:
            if self.optimizer is not None:
                raise ModeError("this trainer got an optimizer and **lingrad.hf.trainer_kwargs(...); leave one of them out")
            self.optimizer_cls_and_kwargs = given
        _check_plain(find_optimizer(self))

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer; which parameters decay is up to the trainer's ``get_decay_parameter_names``.

        Args:
            model: The model; the trainer's by default.

        Returns:
            The optimizer.
        """
        given = getattr(self, "optimizer_cls_and_kwargs", None)
        if self.optimizer is None and given is not None and given[0] is Factory:
            if model is None and shards(self.args):
                return create_sharded(self, self.create_optimizer)
            decaying = self.get_decay_parameter_names(self.model if model is None else model)
            self.optimizer_cls_and_kwargs = (Factory, {**given[1], "decaying": decaying})
        return super().create_optimizer(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see the Trainer.

        Args:
            resume_from_checkpoint: A folder, or True for the last complete checkpoint in ``output_dir``.
            *args: See the Trainer.
            **kwargs: See the Trainer.

        Returns:
            What the Trainer returns.

        Raises:
            CheckpointError: The folder, or each one there is, is incomplete; the message says what it lacks.
        """
        from transformers.trainer_utils import get_last_checkpoint

        if self._uses_lingrad() and resume_from_checkpoint:
            if resume_from_checkpoint is True:
                folder = self.args.output_dir
                resume_from_checkpoint = last_checkpoint(folder) or get_last_checkpoint(folder) or True
            if not isinstance(resume_from_checkpoint, bool):  # still True where there is none, which the Trainer says
                check_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_optimizer_group(self, param: Any = None) -> Any:
        """The param group of a parameter; of a transformed weight that of its coordinates, which are stepped for it.

        Args:
            param: A parameter of the model, or its name; None for the parameters of all groups.

        Returns:
            The group, or the parameters of each.

        Raises:
            ModeError: The optimizer does not step this parameter.
        """
        optimizer = find_optimizer(self)
        if optimizer is None or param is None:
            return super().get_optimizer_group(param)
        for attachment in optimizer.attachments:
            param = attachment.sub.coords if param is attachment.sub.weight.param else param
        for group in optimizer.param_groups:
            named = isinstance(param, str) and param in group["param_names"]
            if named or any(param is other for other in group["params"]):  # == compares values
                return group
        raise ModeError("no param group has this parameter; give one of the model that trains, or its name")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; what is logged during training gets ``lingrad/*`` added.

        Args:
            logs: What is logged.
            *args: See the Trainer.
            **kwargs: See the Trainer.
        """
        optimizer = find_optimizer(self)
        if optimizer is not None and optimizer.mode is not None and "loss" in logs:
            logs.update(metrics(optimizer))
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        optimizer = find_optimizer(self)
        if optimizer is None:
            return super()._clip_grad_norm(model)
        return self._norm(optimizer, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        optimizer = find_optimizer(self)
        if optimizer is None:
            return super()._get_grad_norm(model, grad_norm)
        return self._norm(optimizer, float("inf")) if grad_norm is None else grad_norm

    def _norm(self, optimizer: SubspaceOptimizer, max_norm: float) -> Tensor | None:
        """The norm before clipping; None if layerwise, where gradients never exist together and none is logged."""
        if optimizer.settings.layerwise is True:
            return None
        self.accelerator.unscale_gradients()
        return whole(optimizer.clip_grad_norm_(max_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain model and, in adapter mode, a PEFT adapter in its folder, in ``adapter/``.

        Args:
            output_dir: The folder; ``args.output_dir`` by default.
            _internal_call: Whether this is for a checkpoint; see ``adapter_in_checkpoints``.
        """
        self._writes_adapter = not _internal_call or self.adapter_in_checkpoints
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self._uses_lingrad() and saves_shards(self):  # of which it writes nothing
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        optimizer = find_optimizer(self)
        if self._writes_adapter and optimizer is not None and optimizer.mode == "adapter":
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            save_adapter(optimizer, self.model, folder, self._no_adapter, self.adapter_options, writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._uses_lingrad() and not self.is_fsdp_enabled:  # which loads the model's own names
            load_renamed(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        optimizer = find_optimizer(self)
        best = Path(self.state.best_model_checkpoint)
        if optimizer is None:
            return
        if not self.is_fsdp_enabled:
            load_renamed(self.model, best)
        if optimizer.mode != "adapter":
            return
        if self.is_fsdp_enabled:
            load_sharded(self, best)
        elif (best / "optimizer.pt").is_file():  # coordinates and ledger belong to the weights
            optimizer.load_state_dict(torch.load(best / "optimizer.pt", map_location="cpu", weights_only=True))
        else:
            self._no_adapter = f"the best model was loaded from '{best}', which has no optimizer.pt (save_only_model)"

    def _uses_lingrad(self) -> bool:
        given = getattr(self, "optimizer_cls_and_kwargs", None)
        return (given is not None and given[0] is Factory) or find_optimizer(self) is not None


@contextmanager
def quantized_allowed(model: Any) -> Iterator[None]:
    """Let a Trainer be made with a quantized model that has no PEFT adapter: lingrad trains its own adapter.

    The Trainer checks this only in its ``__init__``. `TrainerMixin` uses this itself; with a plain trainer write
    ``with lingrad.hf.quantized_allowed(model): trainer = Trainer(model, ...)``.

    Args:
        model: The model; one that is not quantized is left as it is.

    Yields:
        Nothing.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    asked = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if not (isinstance(model, nn.Module) and asked and getattr(quantizer, "is_trainable", False)):
        yield
        return
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


@cache
def ready_made(name: str) -> Any:
    """A trainer's class with `TrainerMixin` before it.

    Args:
        name: A key of ``READY_MADE``. Raises `DependencyError` where its package is missing.

    Returns:
        The class.
    """
    module, base, extra = READY_MADE[name]
    trainer = getattr(optional(module, f"lingrad.hf.{name}", extra), base)
    return type(name, (TrainerMixin, trainer), {"__module__": __name__, "__doc__": f"{base} with `TrainerMixin`."})


def _check_plain(optimizer: SubspaceOptimizer | None) -> None:
    """Make sure that a trainer saves the plain model, W + S z, and not W without the coordinates."""
    if optimizer is not None and optimizer.mode == "adapter" and not optimizer.settings.self_contained:
        raise ModeError(
            "this optimizer is in adapter mode and was made with self_contained=False: the models and checkpoints that the "
            "trainer saves would lack its coordinates; leave that option out"
        )
