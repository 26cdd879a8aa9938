"""Models and checkpoints turned into adapters that PEFT loads, adapters merged into models, GaLore's runs resumed."""

from typing import TYPE_CHECKING

from lingrad.convert.merge import merge as merge
from lingrad.convert.models import convert as convert
from lingrad.convert.run import convert_run as convert_run
from lingrad.deprecated import renamed_attributes as _renamed_attributes
from lingrad.galore.resume import from_galore as from_galore

if not TYPE_CHECKING:  # so that a type checker still reports misspelt names
    _RENAMED = {"Report": "lingrad.peft.AdapterReport", "Row": "lingrad.peft.ChangedTensor"}
    __getattr__ = _renamed_attributes(__name__, _RENAMED)
