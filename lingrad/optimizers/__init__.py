"""Base optimizers, which step the coordinates and the parameters that train in full."""

from lingrad.optimizers.base import Base as Base
from lingrad.optimizers.base import BaseLike as BaseLike
from lingrad.optimizers.base import Choice as Choice
from lingrad.optimizers.base import find as find
from lingrad.optimizers.base import name_of as name_of
from lingrad.optimizers.base import names as names
