"""Runs of any program turned into adapters that PEFT loads, adapters turned into models, GaLore's checkpoints gone on with."""

from lingrad.convert.exact import convert_run as convert_run
from lingrad.convert.galore import from_galore as from_galore
from lingrad.convert.jobs import convert as convert
from lingrad.convert.merging import merge as merge
from lingrad.convert.report import Report as Report
from lingrad.convert.report import Row as Row
