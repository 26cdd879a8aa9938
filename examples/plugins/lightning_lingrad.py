"""lingrad in Lightning: a callback, with which the LightningModule stays as it is.

    from lightning_lingrad import LingradCallback

    lightning.Trainer(..., callbacks=[LingradCallback("svd(rank=128)", lr=1e-4)]).fit(module)

The optimizer replaces the one of the module's ``configure_optimizers``; ``gradient_clip_val`` clips by lingrad's own method.
Checkpoints resume bit for bit. When ``fit`` ends, the model is plain again.
"""

import lightning

import lingrad
from lingrad.errors import ModeError, SpecError


class LingradCallback(lightning.Callback):
    """Trains with lingrad's optimizer.

    Args:
        rules: As for `lingrad.wrap`.
        base: As for `lingrad.wrap`.
        mode: ``optimizer`` or ``adapter``.
        of: Attribute of the LightningModule that is the model; the LightningModule itself if empty.
        schedule: Makes a learning rate scheduler of an optimizer, which is stepped after each step.
        **options: Other arguments of `lingrad.wrap` or `lingrad.adapt`, such as ``lr``.
    """

    def __init__(self, rules, base="adamw", *, mode="optimizer", of="", schedule=None, **options):
        if mode not in ("optimizer", "adapter"):
            raise SpecError(f"mode must be 'optimizer' or 'adapter', not {mode!r}", option="mode")
        self.make = lingrad.adapt if mode == "adapter" else lingrad.wrap
        self.rules, self.base, self.of, self.schedule, self.options = rules, base, of, schedule, options

    def setup(self, trainer, pl_module, stage):
        """Take the place of the module's own methods, until ``fit`` ends."""
        if stage != "fit":
            return

        def configure_optimizers():
            model = getattr(pl_module, self.of) if self.of else pl_module
            optimizer = self.make(model, self.rules, self.base, **self.options)
            if self.schedule is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}

        def configure_gradient_clipping(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            if gradient_clip_val and str(gradient_clip_algorithm or "norm") == "value":
                raise ModeError("gradient_clip_algorithm='value' is not supported: lingrad clips by the norm; use 'norm'")
            if gradient_clip_val:
                optimizer.clip_grad_norm_(gradient_clip_val)

        pl_module.configure_optimizers = configure_optimizers
        pl_module.configure_gradient_clipping = configure_gradient_clipping

    def on_fit_end(self, trainer, pl_module):
        """Merge the coordinates into the weights: the model is plain again."""
        trainer.optimizers[0].detach()

    def teardown(self, trainer, pl_module, stage):
        """Give the module its own methods back."""
        for name in ("configure_optimizers", "configure_gradient_clipping"):
            vars(pl_module).pop(name, None)
