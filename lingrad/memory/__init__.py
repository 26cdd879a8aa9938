"""Where a run's memory goes: told in closed form, simulated on meta tensors, or measured on a real device."""

from __future__ import annotations

from lingrad.memory.closed_form import Ledger as Ledger
from lingrad.memory.closed_form import ledger as ledger
from lingrad.memory.methods import Full as Full
from lingrad.memory.methods import GaloreTorch as GaloreTorch
from lingrad.memory.methods import Lingrad as Lingrad
from lingrad.memory.methods import Lora as Lora
from lingrad.memory.methods import Method as Method
from lingrad.memory.report import MemoryReport as MemoryReport
from lingrad.memory.runs import measure as measure
from lingrad.memory.runs import simulate as simulate
from lingrad.memory.tracker import Tracker as Tracker
from lingrad.memory.tracker import track as track
