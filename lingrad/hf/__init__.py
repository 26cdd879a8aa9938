"""transformers' Trainer and TRL's SFTTrainer with lingrad's optimizer; reached as ``lingrad.hf``.

Importing this imports neither of them: they are imported when they are needed.
"""

from __future__ import annotations

from typing import Any

from lingrad.galore.arguments import GaloreTargets as GaloreTargets
from lingrad.galore.arguments import from_galore_args as from_galore_args
from lingrad.hf.access import finish as finish
from lingrad.hf.access import metrics as metrics
from lingrad.hf.access import optimizer_of as optimizer_of
from lingrad.hf.arguments import trainer_kwargs as trainer_kwargs
from lingrad.hf.folders import check_checkpoint as check_checkpoint
from lingrad.hf.folders import last_checkpoint as last_checkpoint
from lingrad.hf.mixin import READY_MADE, ready_made
from lingrad.hf.mixin import TrainerMixin as TrainerMixin
from lingrad.hf.mixin import quantized_allowed as quantized_allowed
from lingrad.hf.sharded import prepare as prepare


def __getattr__(name: str) -> Any:
    """``LingradTrainer`` and ``LingradSFTTrainer``, made at first use."""
    if name in READY_MADE:
        return ready_made(name)
    raise AttributeError(f"module 'lingrad.hf' has no attribute '{name}'")
