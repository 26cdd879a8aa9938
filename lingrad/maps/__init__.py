"""Linear maps from a small space of coordinates to a weight; all products with bases are computed here.

Layout: a weight is W [m, n] = [out, in]; coordinates are z [p, q]. A left basis P is [m, p], a right basis Q is [n, q],
and ``lift(z) = P z Q^T``, a missing factor meaning the identity (then p = m, or q = n).

The duality needs linearity only (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3); bases need not have
orthonormal columns.
"""

from lingrad.maps.base import LinearMap as LinearMap
from lingrad.maps.base import as_gradient as as_gradient
from lingrad.maps.kronecker import KroneckerMap as KroneckerMap
from lingrad.maps.selection import SelectionMap as SelectionMap
from lingrad.maps.stacked import BatchedMap as BatchedMap
from lingrad.maps.stacked import StackedMap as StackedMap
from lingrad.maps.stacked import stacked_map as stacked_map
from lingrad.maps.two_sided import TwoSidedMap as TwoSidedMap
from lingrad.maps.two_sided import two_sided as two_sided
