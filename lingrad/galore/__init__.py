"""galore_torch and the Trainer's GaLore: their arguments translated, their runs resumed."""
