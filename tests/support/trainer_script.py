"""A training script, for tests that run it in processes of its own and kill these.

python -m tests.support.trainer_script OUTPUT MODE SPEC [--kill-at STEP | --kill-in-save STEP] [--accumulate N] [--rows N]

It resumes from the last complete checkpoint if there is one, and saves the model at the end.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

import lingrad.hf
from tests.support.models import llama
from tests.support.trainers import arguments, examples


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("mode")
    parser.add_argument("spec")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import TrainerCallback

    args = arguments(
        given.output,
        max_steps=9,
        save_strategy="steps",
        save_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=given.rows,
        weight_decay=0.1,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == given.kill_at:
                die()
            control.should_training_stop = state.global_step == given.steps

    class Trainer(lingrad.hf.LingradTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            super()._save_optimizer_and_scheduler(output_dir)
            if self.state.global_step == given.kill_in_save:
                path = Path(output_dir) / "optimizer.pt"
                os.truncate(path, path.stat().st_size // 2)
                die()

    trainer = Trainer(
        llama(torch.float32),
        args,
        train_dataset=examples(),
        callbacks=[Stop()],
        **lingrad.hf.trainer_kwargs(given.spec, args, mode=given.mode),
    )
    trainer.train(resume_from_checkpoint=lingrad.hf.last_checkpoint(given.output))
    if given.steps == 9:
        trainer.save_model(f"{given.output}/final-{args.process_index}", _internal_call=True)
    opt = lingrad.hf.optimizer_of(trainer)
    torch.save(
        {"weights": opt.weights(), "state": opt.state_dict(), "rank": args.process_index, "world": args.world_size},
        f"{given.output}/end-{args.process_index}.pt",
    )
    if args.world_size > 1 and given.steps == 9:
        lingrad.hf.finish(trainer)
        trainer.train()  # anew, without the DistributedDataParallel that knew the first run's coordinates
        assert trainer.model_wrapped is not trainer.model
    if args.world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


if __name__ == "__main__":
    sys.exit(main())
