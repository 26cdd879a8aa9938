"""Memory of a training run: estimated in closed form, simulated on meta tensors, or measured on a real device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingrad.deprecated import renamed_attributes as _renamed_attributes
from lingrad.memory.estimate import Estimate as Estimate
from lingrad.memory.estimate import estimate as estimate
from lingrad.memory.moments import MomentReport as MomentReport
from lingrad.memory.moments import moments as moments
from lingrad.memory.report import MemoryReport as MemoryReport
from lingrad.memory.runs import measure as measure
from lingrad.memory.runs import simulate as simulate
from lingrad.memory.tracker import Tracker as Tracker
from lingrad.memory.tracker import track as track
from lingrad.methods import FullRank as FullRank
from lingrad.methods import GaloreTorch as GaloreTorch
from lingrad.methods import Lingrad as Lingrad
from lingrad.methods import Lora as Lora
from lingrad.methods import Method as Method

if not TYPE_CHECKING:  # so that a type checker still reports misspelt names
    _RENAMED = {"ledger": "estimate", "Ledger": "Estimate", "Moments": "MomentReport", "Full": "FullRank"}
    __getattr__ = _renamed_attributes(__name__, _RENAMED)
