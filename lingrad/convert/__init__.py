"""Runs of any program turned into adapters that PEFT loads, adapters turned into models, GaLore's checkpoints gone on with."""

from lingrad.convert.merge import merge as merge
from lingrad.convert.models import convert as convert
from lingrad.convert.report import Report as Report
from lingrad.convert.report import Row as Row
from lingrad.convert.run import convert_run as convert_run
from lingrad.galore.resume import from_galore as from_galore
