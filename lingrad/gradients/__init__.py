"""Gradients of a weight matrix, known by their products."""

from lingrad.gradients.base import Gradient as Gradient
from lingrad.gradients.local import DenseGradient as DenseGradient
from lingrad.gradients.local import FactoredGradient as FactoredGradient
from lingrad.gradients.local import RowsGradient as RowsGradient
from lingrad.gradients.local import accumulate as accumulate
