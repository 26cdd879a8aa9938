"""A folder with a tiny Llama and a tokenizer of a few words, and files of rows, for the tests of tasks."""

import json

from tests.support.models import VOCABULARY, llama

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "how", "many", "cats", "are", "there", "?", ".", "user", "bot"]
WORDS += ["Question", "Answer", ":", "#", "is", "then", *"0123456789"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }}"
    "{% if message.role == 'assistant' %} <eos>{% endif %} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def word_tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "assistant", *WORDS])}
    assert len(vocabulary) <= VOCABULARY
    made = Tokenizer(models.WordLevel(vocabulary, **{"unk_token": "<unk>"}))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    found.chat_template = template
    return found


def save_language_model(folder, **changes):
    """A float32 Llama with its tokenizer, as a folder; the folder."""
    import torch

    llama(torch.float32, **changes).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path, rows):
    """Rows as JSON lines, a JSON list or Parquet, by the name of the file; the path."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
