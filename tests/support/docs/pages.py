"""Pages of the documentation, whose code blocks tests run as printed."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def blocks(name, language="python"):
    """The code blocks of a page, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


def commands(name):
    """The command lines of a page, in order, but for those that install lingrad itself."""
    lines = [line for block in blocks(name, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("pip install")]


def run(block, names, page):
    """Run a block in ``names``, as one goes on typing where the block before ended."""
    exec(compile(block, f"docs/{page}", "exec"), names)  # noqa: S102 - our own text
    return names


def assert_learned(history):
    """That a trainer's log shows what docs/quickstart.md promises: both losses fall."""
    first, last = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    start, *_, end = (entry["loss"] for entry in history if "loss" in entry)
    assert last < first
    assert end < 0.6 * start


def assert_adapter_is_the_model(folder, ids):
    """That what docs/loop.md writes belongs together: ``start`` with ``adapter`` is ``final``, to what the page accepts.

    What is left is what bfloat16 merges have rounded away: the page accepts 5% of the change.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start, final = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("start", "final"))
    with torch.no_grad():
        before, after = start(ids).logits, final(ids).logits
        adapted = PeftModel.from_pretrained(start, folder / "adapter")(ids).logits
    assert (adapted - after).abs().max() < 0.05 * (after - before).abs().max()
