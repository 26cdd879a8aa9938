"""The names of galore_torch and of the Trainer's GaLore, and lingrad's names for the same things."""

from __future__ import annotations

BASES = {"galore_adamw": "adamw", "galore_adamw_8bit": "adamw8bit", "galore_adafactor": "adafactor"}  # optim -> base optimizer
LAYERWISE = "_layerwise"  # ends the name of an optim that steps each weight inside the backward
DEFAULTS = {"rank": "128", "update_proj_gap": "200", "scale": "0.25", "proj_type": "std"}  # of the Trainer's optim_args
SIDES = {"std": "short", "reverse_std": "long", "right": "right", "left": "left", "full": "both"}  # proj_type -> side
PROJECTOR = "galore_torch.galore_projector.GaLoreProjector"  # the class of the objects in its checkpoints
MOMENTS = ("exp_avg", "exp_avg_sq")  # of its AdamW


def is_galore(optim: str) -> bool:
    """Whether a name of ``optim`` is one of the Trainer's own GaLore."""
    return optim.removesuffix(LAYERWISE) in BASES
