"""Where a run's memory goes: told in closed form, simulated on meta tensors, or measured on a real device."""

from __future__ import annotations

from lingrad.memory.estimate import Ledger as Ledger
from lingrad.memory.estimate import ledger as ledger
from lingrad.memory.moments import Moments as Moments
from lingrad.memory.moments import moments as moments
from lingrad.memory.report import MemoryReport as MemoryReport
from lingrad.memory.runs import measure as measure
from lingrad.memory.runs import simulate as simulate
from lingrad.memory.tracker import Tracker as Tracker
from lingrad.memory.tracker import track as track
from lingrad.methods import Full as Full
from lingrad.methods import GaloreTorch as GaloreTorch
from lingrad.methods import Lingrad as Lingrad
from lingrad.methods import Lora as Lora
from lingrad.methods import Method as Method
