"""The options of a run: each once, with its checks, and which of them a checkpoint must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lingrad.config.offload import offload_text, parse_offload
from lingrad.config.residual import parse_residual
from lingrad.config.rounds import Rounds
from lingrad.errors import did_you_mean, require, require_one_of, shown
from lingrad.weights.dense import Merge as Merge
from lingrad.weights.rounding import RoundingKind as RoundingKind

Mode = Literal["optimizer", "adapter"]  # when coordinates are merged: at every step, or at each refresh
Carry = Literal["keep", "reset", "rotate", "transport"]  # what a refresh does to moments
Share = Literal["input"]  # which weights share a basis: linear layers that read one input
InBackward = bool | Literal["coordinates"]  # what happens to a weight inside the backward: a step, or a refresh
Scale = float | Literal["norm"]  # what multiplies the learning rate of coordinates
TrainOnly = Literal["transformed"]  # what trains, of what no rule names
Compat = Literal["galore"]  # another program's arithmetic

MOVES = ("rotate", "transport")  # of Carry, what takes moments to another basis
_LARGEST = torch.finfo(torch.float64).max  # of a number

# A checkpoint may be loaded with other values of these; any other option changes what it means.
_FREE = (
    "rest_lr",
    "weight_decay",
    "scale",
    "layerwise",
    "merge",
    "merge_every",
    "process_group",
    "rounds",
    "offload",
    "train_only",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `lingrad.wrap` and `lingrad.adapt`, documented there; without model, rules, base and the base's options.

    Raises:
        SpecError: An option is wrong, or two of them exclude each other.
    """

    rest_lr: float | Tensor | None = None
    weight_decay: float = 0.0
    scale: Scale = 1.0
    carry: Carry = "keep"
    residual: str | None = None
    seed: int = 0
    compat: Compat | None = None
    layerwise: InBackward = False
    stagger: bool = False
    share: Share | None = None
    ledger: bool = False
    self_contained: bool = True
    merge: Merge = "auto"
    rounding: RoundingKind = "nearest"
    process_group: Any = None
    offload: str | None = None
    train_only: TrainOnly | None = None
    merge_every: int | None = None
    keep_remainder: bool = False
    rounds: Rounds | None = None

    def __post_init__(self) -> None:
        """Check every option, and the pairs that exclude each other."""
        require_one_of(self.carry, get_args(Carry), "carry")
        require_one_of(self.merge, get_args(Merge), "merge")
        require_one_of(self.rounding, get_args(RoundingKind), "rounding")
        require(
            self.rounding == "nearest" or self.merge != "fast",
            "merge",
            f"merge='fast' rounds S z to the weight's dtype before rounding='{self.rounding}' could see it; leave one of them "
            "out",
        )
        require(
            self.rounding == "nearest" or not self.keep_remainder,
            "keep_remainder",
            f"rounding='{self.rounding}' leaves no remainder to keep; leave keep_remainder or rounding out",
        )
        if self.residual is not None:
            object.__setattr__(self, "residual", str(parse_residual(self.residual)))
            require(
                self.compat is None,
                "residual",
                f"compat='{self.compat}' follows a program that drops the residual; leave compat or residual out",
            )
            require(
                not self.ledger,
                "residual",
                f"residual='{self.residual}' steps outside of the span of the basis, so that the change of a weight has no low "
                "rank for the ledger to record; leave ledger or residual out",
            )
        object.__setattr__(self, "offload", offload_text(self.offloaded))
        require(
            self.ledger or "ledger" not in self.offloaded,
            "offload",
            f"offload='{self.offload}' names the ledger, and this run records none; make it with ledger=True, or leave the "
            "word out",
        )
        require(
            self.offload is None or self.rounds is None,
            "offload",
            "workers exchange coordinates and start moments again outside of steps, where offloaded state is not on the "
            "device; leave offload or rounds out",
        )
        check_not_negative("weight_decay", self.weight_decay)
        check_scale(self.scale)
        if self.rest_lr is not None:
            check_not_negative("rest_lr", self.rest_lr)
        require(
            type(self.layerwise) is bool or self.layerwise == "coordinates",
            "layerwise",
            f"layerwise must be True, False or 'coordinates', not {self.layerwise!r}",
        )
        require(
            self.residual is None or self.layerwise != "coordinates",
            "residual",
            f"residual='{self.residual}' reads whole gradients in the step, and layerwise='coordinates' keeps none until then; "
            "leave one of them out",
        )
        for option in ("stagger", "ledger", "self_contained", "keep_remainder"):
            value = getattr(self, option)
            require(type(value) is bool, option, f"{option} must be True or False, not {value!r}")
        require(type(self.seed) is int, "seed", f"seed must be a whole number, not {self.seed!r}")
        for option, words in (("compat", get_args(Compat)), ("share", get_args(Share)), ("train_only", get_args(TrainOnly))):
            value = getattr(self, option)
            expected = " or ".join([*map(repr, words), "None"])
            near = did_you_mean(str(value), words)
            require(value is None or value in words, option, f"{option} must be {expected}, not {value!r}{near}")
        require(
            self.share is None or not self.layerwise,
            "share",
            f"share='input' refreshes several weights together, and layerwise={self.layerwise!r} takes one after the other; "
            "leave one of them out",
        )
        steps = self.merge_every
        require(
            self.rounds is None or isinstance(self.rounds, Rounds),
            "rounds",
            f"rounds must be a lingrad.decentralized.Rounds, or None, not {self.rounds!r}",
        )
        fits = steps is None or (type(steps) is int and steps >= 1)
        require(fits, "merge_every", f"merge_every must be a number of steps, 1 or more, or None, not {steps!r}")

    @property
    def offloaded(self) -> frozenset[str]:
        """What is in host memory between steps: some of ``moments``, ``bases``, ``ledger``."""
        return parse_offload(self.offload)

    def check_mode(self, mode: Mode) -> None:
        """Make sure that a run with these options can be made in a mode.

        Args:
            mode: ``optimizer`` or ``adapter``.
        """
        require_one_of(mode, get_args(Mode), "mode")
        require(
            self.merge_every is None or mode == "adapter",
            "merge_every",
            "merge_every is for adapter mode; optimizer mode merges at every step. Use lingrad.adapt(..., merge_every=...)",
        )
        require(
            self.residual is None or mode == "optimizer",
            "residual",
            f"residual='{self.residual}' steps outside of the span of the basis, which no adapter holds, so that adapter mode "
            "has no such run; use lingrad.wrap, or leave residual out",
        )
        require(
            self.rounds is None or mode == "adapter",
            "rounds",
            "a worker's round is what its coordinates hold at its end, and optimizer mode merges them at every step. Use "
            "lingrad.adapt(..., rounds=...)",
        )

    def identity(self) -> dict[str, Any]:
        """The options that a checkpoint must agree on, by name."""
        return {option.name: getattr(self, option.name) for option in fields(self) if option.name not in _FREE}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(option.name for option in fields(cls))

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """Take the options of a run out of keyword arguments.

        Args:
            options: Options of a run and of its base optimizer.

        Returns:
            The settings, and the remaining options: those of the base, and unknown ones.
        """
        own = {name: value for name, value in options.items() if name in cls.names()}
        return cls(**own), {name: value for name, value in options.items() if name not in own}


def check_scale(value: Any) -> None:
    """Make sure that a scale is a number, 0 or more, or ``norm``.

    Args:
        value: Its value.
    """
    if not isinstance(value, str):
        check_not_negative("scale", value)
    require(
        not isinstance(value, str) or value == "norm", "scale", f"scale must be a number, 0 or more, or 'norm', not {value!r}"
    )


def check_not_negative(option: str, value: Any) -> None:
    """Make sure that a hyper-parameter is a finite number, 0 or more; it may be a 0-d tensor.

    Args:
        option: Its name.
        value: Its value.
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    fits = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= _LARGEST
    require(fits, option, f"{option} must be a number, 0 or more, not {shown(value)}")
