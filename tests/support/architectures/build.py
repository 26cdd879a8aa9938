"""A tiny model of an architecture that runs: the config, its inputs, the dtype and the mode that work in plain torch."""

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.architectures.catalog import Architecture
from tests.support.architectures.inputs import Float64, Inputs, loss_of
from tests.support.architectures.tiny import LEVELS, tiny

ELEMENTS = 20_000_000  # of a model; a larger one takes too long


class NotBuiltError(Exception):
    """No tiny model of an architecture runs here; the message says why."""


@dataclass
class Ready:
    """A model that runs.

    Args:
        model: The model with its initial weights; copied for every run.
        inputs: What its forward is called with.
        dtype: That it runs in.
        training: Whether it runs in train mode.
        level: How its config was made small.
    """

    model: Any
    inputs: dict[str, Tensor]
    dtype: torch.dtype
    training: bool
    level: str

    def copy(self) -> Any:
        """A model with the initial weights."""
        return copy.deepcopy(self.model).train(self.training)

    def backward(self, model: nn.Module, step: int) -> Tensor:
        """Forward and backward of a step, with the same random numbers in every run, and the loss."""
        with seeded(step), Float64() if self.dtype == torch.float64 else nullcontext():
            loss = loss_of(model(**self.inputs))
            loss.backward()  # in which some models compute their layers again
        return loss.detach()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python that are the same every time."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(architecture: Architecture, level: str) -> Any:
    """A tiny model with random weights, in float32."""
    import transformers

    cls = getattr(transformers, architecture.name)
    config_class = cls.config_class if cls.config_class is not None else transformers.CONFIG_MAPPING[architecture.model_type]
    mapped = transformers.CONFIG_MAPPING[architecture.model_type]
    if isinstance(mapped, type) and issubclass(mapped, config_class):
        config_class = mapped
    config = tiny(config_class, level, architecture.name)
    with torch.device("meta"):
        size = sum(param.numel() for param in cls(copy.deepcopy(config)).parameters())
    if size > ELEMENTS:
        raise NotBuiltError(f"{size:,} elements at the level '{level}'")
    for each in _configs(config):
        each._experts_implementation = "eager"  # the grouped product does not support float64
        if hasattr(each, "use_cache"):
            each.use_cache = False
    with seeded(0):
        model = cls(config)
        with torch.no_grad():  # zeros that hide a fault, and memory that no initialisation of transformers has filled
            for param in model.parameters():
                if param.is_floating_point() and param.dim() > 1 and (not param.isfinite().all() or not param.any()):
                    param.normal_(std=0.02)
                elif not param.isfinite().all():
                    param.zero_()
    model.config.architectures = [architecture.name]
    return model


def prepare(architecture: Architecture) -> Ready:
    """A tiny model of an architecture that runs forward and backward in plain torch.

    Raises:
        NotBuiltError: None does; the message says what failed last at the smallest size.
    """
    reasons: list[str] = []
    warnings.simplefilter("ignore")
    for level in LEVELS:
        try:
            model = build(architecture, level)
        except Exception as error:  # a model may raise any exception
            reasons.append(f"build: {_words(error)}")
            continue
        for dtype in (torch.float64, torch.float32):
            found = _running(model, dtype, level, reasons)
            if found is not None:
                return found
    raise NotBuiltError(reasons[0] if reasons else "no inputs")


def _running(model: Any, dtype: torch.dtype, level: str, reasons: list[str]) -> Ready | None:
    torch.set_default_dtype(dtype)
    model = model.to(dtype)
    for training in (True, False):
        for inputs in Inputs(model, dtype).candidates():
            ready = Ready(model, inputs, dtype, training, level)
            try:
                trial = ready.copy()
                loss = ready.backward(trial, 0)
            except Exception as error:  # a model may raise any exception
                reasons.append(f"{', '.join(inputs)}: {_words(error)}")
                continue
            if not bool(loss.isfinite()) or any(p.grad is not None and not p.grad.isfinite().all() for p in trial.parameters()):
                reasons.append(f"{', '.join(inputs)}: loss or gradients are not finite")
                continue
            return ready
    return None


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configs(value)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
