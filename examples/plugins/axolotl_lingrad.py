"""lingrad in axolotl.

Put this file into the folder where axolotl is started, put that folder on the path (``PYTHONPATH=. axolotl train config.yml``),
and add to the config:

    plugins:
      - axolotl_lingrad.LingradPlugin
    lingrad:
      rules: svd(rank=128)
      mode: adapter

What is under ``lingrad`` goes to `lingrad.hf.trainer_kwargs`. Learning rate, schedule, weight decay, clipping and precision are
axolotl's own settings. Leave ``adapter`` out: lingrad trains the model itself. ``optimizer`` stays at its default, or names
the base: ``adamw_8bit`` with ``base: adamw8bit``.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

import lingrad.hf
from lingrad.errors import SpecError


class LingradArgs(BaseModel):
    """The section of the config."""

    lingrad: dict[str, Any] | None = None


class LingradPlugin(BasePlugin):
    """Trains with lingrad's optimizer where the config has a section ``lingrad``."""

    def get_input_args(self):
        """Name the model that axolotl adds to its schema."""
        return f"{__name__}.LingradArgs"

    def get_trainer_cls(self, cfg):
        """Put `lingrad.hf.TrainerMixin` before axolotl's own trainer, for its clipping, logs and adapters.

        Preference and reward trainers stay as they are; they train with lingrad's optimizer as a plain Trainer does.
        """
        if not cfg.lingrad or cfg.rl or cfg.reward_model or cfg.process_reward_model or cfg.trainer_cls:
            return None
        from axolotl.core.trainers.base import AxolotlTrainer  # it imports every kernel axolotl has; only a training needs it

        return type("LingradAxolotlTrainer", (lingrad.hf.TrainerMixin, AxolotlTrainer), {})

    def post_trainer_create(self, cfg, trainer):
        """Choose the optimizer, which the trainer makes when training begins."""
        if not cfg.lingrad:
            return
        if cfg.adapter:
            raise SpecError(f"adapter: {cfg.adapter} and lingrad are two ways to train the same weights; remove one of them")
        ignored = [
            name for name in ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups") if getattr(cfg, name)
        ]
        if ignored:
            raise SpecError(f"{', '.join(ignored)} would have no effect with lingrad; remove it, and use rest_lr or rules")
        if trainer.optimizer_cls_and_kwargs is not None:
            raise SpecError(
                f"optimizer: {cfg.optimizer} would have no effect with lingrad; remove it, and set base under lingrad"
            )
        settings = plain(cfg.lingrad)
        if "rules" not in settings:
            raise SpecError("the section lingrad needs rules, such as rules: svd(rank=128)")
        chosen = lingrad.hf.trainer_kwargs(settings.pop("rules"), trainer.args, **settings)
        trainer.optimizer_cls_and_kwargs = chosen["optimizer_cls_and_kwargs"]


def plain(value):
    """The same value with ordinary dicts in place of axolotl's, whose missing keys are None."""
    return {key: plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value
