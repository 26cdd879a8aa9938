"""How a basis is chosen and refreshed: one file per transform, with a name for config strings."""

from typing import TYPE_CHECKING

from lingrad.deprecated import renamed_attributes as _renamed_attributes
from lingrad.transforms.base import Probe as Probe
from lingrad.transforms.base import Sketch as Sketch
from lingrad.transforms.base import Transform as Transform
from lingrad.transforms.base import When as When
from lingrad.transforms.coded import Coded as Coded
from lingrad.transforms.dct import DCT as DCT
from lingrad.transforms.experts import Experts as Experts
from lingrad.transforms.full import Full as Full
from lingrad.transforms.kron import Kron as Kron
from lingrad.transforms.linalg import align_signs as align_signs
from lingrad.transforms.linalg import derive_seed as derive_seed
from lingrad.transforms.linalg import leading_vectors as leading_vectors
from lingrad.transforms.linalg import orthonormalize as orthonormalize
from lingrad.transforms.pca import PCA as PCA
from lingrad.transforms.power import Power as Power
from lingrad.transforms.random import Random as Random
from lingrad.transforms.registry import register as register
from lingrad.transforms.rows import RowSelection as RowSelection
from lingrad.transforms.schedules import AdaptiveSchedule as AdaptiveSchedule
from lingrad.transforms.schedules import EnergySchedule as EnergySchedule
from lingrad.transforms.schedules import OverlapSchedule as OverlapSchedule
from lingrad.transforms.schedules import PathSchedule as PathSchedule
from lingrad.transforms.side import BasisTransform as BasisTransform
from lingrad.transforms.side import Sides as Sides
from lingrad.transforms.side import SideTransform as SideTransform
from lingrad.transforms.slice import Slice as Slice
from lingrad.transforms.svd import SVD as SVD
from lingrad.transforms.switch import Switch as Switch
from lingrad.transforms.weight import WeightVectors as WeightVectors

if not TYPE_CHECKING:  # so that a type checker still reports misspelt names
    _OLD = {"Bases": "Sides", "GradientBasis": "SideTransform", "SketchBasis": "SideTransform"}
    __getattr__ = _renamed_attributes(__name__, _OLD)
