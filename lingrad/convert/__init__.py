"""Models and checkpoints turned into adapters that PEFT loads, adapters merged into models, GaLore's runs resumed."""

from lingrad.convert.merge import merge as merge
from lingrad.convert.models import convert as convert
from lingrad.convert.run import convert_run as convert_run
from lingrad.galore.resume import from_galore as from_galore
