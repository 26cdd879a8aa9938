"""lingrad in LLaMA-Factory: this script in place of ``llamafactory-cli train``.

    python llamafactory_lingrad.py train.yaml

Several processes: ``torchrun --nproc_per_node 2 llamafactory_lingrad.py train.yaml``. The config is LLaMA-Factory's, with a
section of its own:

    finetuning_type: full
    lingrad:
      rules: svd(rank=128)
      mode: adapter

What is under ``lingrad`` goes to `lingrad.hf.trainer_kwargs`. Learning rate, schedule, weight decay, clipping and precision are
LLaMA-Factory's own settings.
"""

import lingrad.hf
from lingrad.errors import SpecError


def optimizer_maker(settings):
    """A function that stands for LLaMA-Factory's ``create_custom_optimizer``.

    Args:
        settings: Arguments of `lingrad.hf.trainer_kwargs` without ``args``.
    """

    def create_custom_optimizer(model, training_args, finetuning_args):
        kind = finetuning_args.finetuning_type
        if kind not in ("full", "freeze"):
            raise SpecError(f"finetuning_type: {kind} and lingrad are two ways to train the same weights; use full")
        for name in ("use_galore", "use_apollo", "loraplus_lr_ratio", "use_badam", "use_adam_mini", "use_muon"):
            if getattr(finetuning_args, name, None):
                raise SpecError(f"{name} would have no effect with lingrad; remove it")
        factory, options = lingrad.hf.trainer_kwargs(args=training_args, **settings)["optimizer_cls_and_kwargs"]
        return factory()(model, **options)

    return create_custom_optimizer


def main():
    """Train."""
    from llamafactory.hparams.parser import read_args
    from llamafactory.train import trainer_utils

    args = read_args()
    settings = args.pop("lingrad", None) if isinstance(args, dict) else None
    if not isinstance(settings, dict) or "rules" not in settings:
        raise SpecError("expected a YAML file with a section lingrad that has rules, such as rules: svd(rank=128)")
    trainer_utils.create_custom_optimizer = optimizer_maker(settings)
    from llamafactory.train.tuner import run_exp  # after the line above: the trainers take the function when they are imported

    run_exp(args)


if __name__ == "__main__":
    main()
