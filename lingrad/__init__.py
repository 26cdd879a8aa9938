"""Linear gradient transformations and their dual adapters: one engine, two modes."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from lingrad import errors as errors
from lingrad import optimizers as optimizers
from lingrad import transforms as transforms
from lingrad.api import adapt as adapt
from lingrad.api import wrap as wrap
from lingrad.config import spec as spec
from lingrad.engine.optimizer import SubspaceOptimizer as SubspaceOptimizer
from lingrad.errors import LingradError as LingradError
from lingrad.gradients.base import Gradient as Gradient
from lingrad.maps import LinearMap as LinearMap
from lingrad.transforms import BasisTransform as BasisTransform
from lingrad.transforms import SideTransform as SideTransform
from lingrad.transforms import Transform as Transform
from lingrad.transforms import register as register

__version__ = "0.1.0"


def __getattr__(name: str) -> _ModuleType:
    """The modules that meet other packages, imported when they are first asked for."""
    if name in ("convert", "hf", "peft"):
        return _import_module(f"lingrad.{name}")
    raise AttributeError(f"module 'lingrad' has no attribute {name!r}")
