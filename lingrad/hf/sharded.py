"""Models that accelerate shards by FSDP2, in the Trainer or without it.

lingrad's optimizer is made of the shards, and so after them; ``accelerator.prepare`` wants model and optimizer at once, and
puts the shards into an optimizer that was made before. Here it gets another one in place of lingrad's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lingrad.errors import ModeError, SpecError, optional
from lingrad.tensors import is_sharded

_PREPARED = "_is_accelerate_prepared"  # accelerate's own mark
_ON = {"1", "true", "yes", "y", "t", "on"}
_FSDP1 = (
    "the first FullyShardedDataParallel makes flat vectors of weights, in which there are no subspaces; use FSDP2: "
    "fsdp_version: 2 in accelerate's config, fsdp_config={'version': 2} of TrainingArguments"
)
_DEEPSPEED = (
    "DeepSpeed cuts weights, gradients or the optimizer's parameters into flat vectors of its own, in which there are no "
    "subspaces; leave it out, and shard by FSDP2: TrainingArguments(fsdp=True), or fsdp_version: 2 in accelerate's config"
)


def prepare(accelerator: Any, model: nn.Module, make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, Any]:
    """Have accelerate prepare a model and lingrad's optimizer, in the order that sharding asks for.

    ``model, opt = lingrad.hf.prepare(accelerator, model, lambda model: lingrad.wrap(model, rules, lr=1e-3))`` stands for
    ``accelerator.prepare(model, opt)``, with which it is the same where accelerate does not shard.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        model: The model, not sharded yet.
        make: Makes the optimizer, of the model that it is passed.

    Returns:
        The model, and the optimizer in accelerate's wrapper. Data loaders and schedulers go to ``accelerator.prepare`` as ever.

    Raises:
        SpecError: There is no Accelerator.
        ModeError: It shards by another way than FSDP2.
    """
    accelerate = optional("accelerate", "lingrad.hf", "hf")
    if not isinstance(accelerator, accelerate.Accelerator):
        found = type(accelerator).__name__
        raise SpecError(f"accelerator must be an accelerate.Accelerator, not a {found}", option="accelerator")
    check_accelerator(accelerator)
    if not getattr(accelerator, "is_fsdp2", False):
        prepared: tuple[nn.Module, Any] = accelerator.prepare(model, make(model))
        return prepared
    if not getattr(model, _PREPARED, False):
        stand_in = torch.optim.SGD([next(model.parameters())], lr=0.0)
        model, stand_in = accelerator.prepare(model, stand_in)
        accelerator._optimizers = [found for found in accelerator._optimizers if found is not stand_in]
    return _register(accelerator, model, make(model))


def check_accelerator(accelerator: Any) -> None:
    """Make sure that an Accelerator shards by FSDP2, or not at all.

    Args:
        accelerator: The ``accelerate.Accelerator``.

    Raises:
        ModeError: It uses DeepSpeed, or the first FSDP.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)).upper()
    if kind == "DEEPSPEED":
        raise ModeError(_DEEPSPEED)
    if kind == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        raise ModeError(_FSDP1)


def check_parallel(args: Any) -> None:
    """Make sure that lingrad can train as TrainingArguments, or accelerate's launcher, ask for.

    Args:
        args: The TrainingArguments.

    Raises:
        ModeError: It cannot.
    """
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _ON:
        raise ModeError(_DEEPSPEED)
    if shards(args):
        given = getattr(args, "fsdp_plugin_args", None) or {}
        if (getattr(args, "fsdp_config", None) or {}).get("xla"):
            raise ModeError("lingrad cannot train with FSDP on XLA devices; leave fsdp_config={'xla': ...} out")
        if int(given.get("fsdp_version") or os.environ.get("FSDP_VERSION") or 1) != 2:
            raise ModeError(_FSDP1)
    if args.n_gpu > 1:
        raise ModeError(
            f"the Trainer would put {args.n_gpu} GPUs into one DataParallel, whose copies of the model are not trained; "
            "start one process for each with 'accelerate launch' or 'torchrun', or use one only: CUDA_VISIBLE_DEVICES=0"
        )


def shards(args: Any) -> bool:
    """Whether TrainingArguments, or accelerate's launcher, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in _ON


def check_order(model: nn.Module, args: Any) -> None:
    """Make sure that a model was sharded by the Trainer, before the optimizer is made of it, or not at all.

    Args:
        model: The Trainer's model.
        args: The TrainingArguments.

    Raises:
        ModeError: It was not.
    """
    sharded = any(is_sharded(param) for param in model.parameters())
    if shards(args) and not sharded:
        raise ModeError(
            "with fsdp the optimizer must be made after the model is sharded, and this Trainer makes it before; use "
            "lingrad.hf.LingradTrainer, LingradSFTTrainer, or lingrad.hf.TrainerMixin before your trainer's class"
        )
    if sharded and not shards(args):
        raise ModeError(
            "this model was sharded before the Trainer got it (fully_shard, from_pretrained with distributed_config or "
            "tp_plan), whose checkpoints would hold the optimizer's state of one process only; pass it unsharded, with "
            "TrainingArguments(fsdp=True)"
        )


def create_sharded(trainer: Any, create: Callable[[nn.Module], Optimizer]) -> Any:
    """Shard a Trainer's model, and make its optimizer then.

    Args:
        trainer: A Trainer that has no optimizer yet, and is asked for FSDP.
        create: Makes the optimizer of the sharded model.

    Returns:
        The optimizer, in accelerate's wrapper.

    Raises:
        ModeError: Accelerate does not shard by FSDP2.
    """
    accelerator = trainer.accelerator
    check_accelerator(accelerator)
    if not getattr(accelerator, "is_fsdp2", False):
        raise ModeError(
            f"fsdp was asked for, and accelerate does not shard here ({accelerator.distributed_type}: it shards on GPUs only); "
            "leave fsdp out, and the processes train with DistributedDataParallel"
        )
    trainer.model, trainer.optimizer = prepare(accelerator, trainer.model, create)
    trainer.model_wrapped = trainer.model
    ask = accelerator.prepare

    def prepare_once(*given: Any, **options: Any) -> Any:
        """The Trainer's own call, at the begin of each train(): the model is sharded, and the optimizer made of its shards."""
        ready = trainer.optimizer
        if len(given) == 2 and given[0] is trainer.model and given[1] is ready and getattr(ready, _PREPARED, False):
            return _register(accelerator, *given)
        return ask(*given, **options)

    if getattr(ask, "__name__", "") != prepare_once.__name__:
        accelerator.prepare = prepare_once
    return trainer.optimizer


def _register(accelerator: Any, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """What accelerate does with what it has prepared already: it keeps it, for clips and checkpoints."""
    optimizer = accelerator.prepare_optimizer(optimizer)
    setattr(optimizer, _PREPARED, True)
    return accelerator.prepare_model(model), optimizer


def saves_shards(trainer: Any) -> bool:
    """Whether a Trainer's checkpoints hold shards, and its ``save_model`` nothing."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)


def load_sharded(trainer: Any, folder: Path) -> None:
    """Load the optimizer's state from a checkpoint of a Trainer with FSDP.

    Args:
        trainer: The Trainer.
        folder: The checkpoint.
    """
    load = optional("accelerate.utils", "lingrad.hf", "hf").load_fsdp_optimizer
    accelerator = trainer.accelerator
    load(accelerator.state.fsdp_plugin, accelerator, trainer.optimizer, trainer.model, str(folder))
