"""Linear gradient transformations and their dual adapters: one engine, two modes."""

from importlib import import_module as _import_module
from typing import Any as _Any

from lingrad import deprecated as _deprecated
from lingrad import errors as errors
from lingrad import optimizers as optimizers
from lingrad import transforms as transforms
from lingrad.api import adapt as adapt
from lingrad.api import wrap as wrap
from lingrad.config import spec as spec
from lingrad.config.explain import explain as explain
from lingrad.config.ranks import ranks_by_energy as ranks_by_energy
from lingrad.engine.optimizer import SubspaceOptimizer as SubspaceOptimizer
from lingrad.errors import LingradError as LingradError
from lingrad.gradients import Gradient as Gradient
from lingrad.maps import LinearMap as LinearMap
from lingrad.transforms import BasisTransform as BasisTransform
from lingrad.transforms import SideTransform as SideTransform
from lingrad.transforms import Transform as Transform
from lingrad.transforms import register as register

__version__ = "0.1.0"

_LAZY = ("convert", "decentralized", "hf", "memory", "peft", "research", "testing")

_deprecated.alias_modules()


def __getattr__(name: str) -> _Any:
    """Modules that import more, at their first use; and names of the version before."""
    if name == "find_lr":
        return _import_module("lingrad.research.rates").find_lr
    return _import_module(f"lingrad.{name}") if name in _LAZY else _deprecated.top_level(name)
