"""Linear gradient transformations and their dual adapters: one engine, two modes."""

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
