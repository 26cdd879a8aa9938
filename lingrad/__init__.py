"""Linear gradient transformations and their dual adapters: one engine, two modes."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from lingrad import bases as bases
from lingrad import errors as errors
from lingrad import spec as spec
from lingrad import transforms as transforms
from lingrad.api import adapt as adapt
from lingrad.api import wrap as wrap
from lingrad.errors import LingradError as LingradError
from lingrad.gradient import Gradient as Gradient
from lingrad.maps import LinearMap as LinearMap
from lingrad.optimizer import SubspaceOptimizer as SubspaceOptimizer
from lingrad.transforms import BasisTransform as BasisTransform
from lingrad.transforms import GradientBasis as GradientBasis
from lingrad.transforms import Transform as Transform
from lingrad.transforms import register as register

__version__ = "0.1.0"


def __getattr__(name: str) -> _ModuleType:
    """The modules that meet other packages, imported when they are first asked for."""
    if name in ("convert", "hf", "peft"):
        return _import_module(f"lingrad.{name}")
    raise AttributeError(f"module 'lingrad' has no attribute {name!r}")
