"""lingrad in ms-swift 4.

Set ``SETTINGS``, and add to the command line:

    swift sft --tuner_type full --external_plugins swift_lingrad.py --optimizer lingrad ...

``SETTINGS`` go to `lingrad.hf.trainer_kwargs`. Learning rate, schedule, weight decay, betas, clipping and precision are
ms-swift's own arguments. Checkpoints are plain models in both modes.
"""

from swift.optimizers import OptimizerCallback, optimizers_map

import lingrad.hf
from lingrad.errors import SpecError

SETTINGS = {"rules": "svd(rank=128)", "mode": "optimizer", "base": "adamw"}


class LingradOptimizer(OptimizerCallback):
    """Makes the optimizer of ``--optimizer lingrad``."""

    def create_optimizer(self, model=None):
        """Make it of the trainer's model, or of ``model``."""
        if getattr(self.args, "tuner_type", "full") != "full":
            raise SpecError(f"--tuner_type {self.args.tuner_type} and lingrad are two ways to train the same weights; use full")
        factory, settings = lingrad.hf.trainer_kwargs(args=self.args, **SETTINGS)["optimizer_cls_and_kwargs"]
        return factory()(self.trainer.model if model is None else model, **settings)


optimizers_map["lingrad"] = LingradOptimizer
