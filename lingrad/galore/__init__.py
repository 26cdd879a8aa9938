"""galore_torch and the Trainer's GaLore: their optimizers, their arguments translated, their runs resumed."""

from lingrad.galore.optimizers import GaLoreAdafactor as GaLoreAdafactor
from lingrad.galore.optimizers import GaLoreAdamW as GaLoreAdamW
from lingrad.galore.optimizers import GaLoreAdamW8bit as GaLoreAdamW8bit
