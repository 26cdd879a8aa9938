"""What fits on which card: simulate the runs of docs/hardware.md, and write its tables and its picture.

    python tools/measure_hardware.py            make hardware: what has no figures yet; a quarter of an hour on one core
    python tools/measure_hardware.py --tables   the page only, from docs/hardware.json

Every run that is simulated is in docs/hardware.json at once, so that it goes on where it was stopped. With another version of
torch, transformers, peft or bitsandbytes, or other cards, all runs are simulated again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lingrad import plotting  # noqa: E402
from lingrad.console import markdown  # noqa: E402
from lingrad.files.atomic import write_whole  # noqa: E402
from lingrad.files.reading import read_json  # noqa: E402
from lingrad.memory import commands  # noqa: E402
from lingrad.memory.commands import Question  # noqa: E402
from lingrad.memory.report import MemoryReport  # noqa: E402
from lingrad.memory.units import CONTEXT, parse_bytes, readable  # noqa: E402
from lingrad.models import LLAMAS  # noqa: E402
from tools.marks import put  # noqa: E402
from tools.measure_memory import MEASURED, apart  # noqa: E402

RESULT, PAGE, PICTURE = (ROOT / "docs" / name for name in ("hardware.json", "hardware.md", "hardware.png"))
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
MODELS = ("llama-1b", "llama-7b", "llama-13b")  # from small to large
Row = dict[str, Any]


class Card(NamedTuple):
    """A card, and the memory that torch finds on it: less than its name says.

    Args:
        name: What it is sold as.
        example: A card with so much.
        capacity: What `torch.cuda.mem_get_info` calls the total, as torch's message of too little memory gives it.
        source: A public thread with such a message.
    """

    name: str
    example: str
    capacity: str
    source: str


CARDS = (  # from small to large
    Card("8 GB", "RTX 4060", "7.75GiB", "ESRSchao/EdgeRegNet/issues/2"),
    Card("12 GB", "RTX 3060", "11.75GiB", "Kunhao-Liu/StyleGaussian/issues/12"),
    Card("16 GB", "RTX A4000", "15.61GiB", "DengKaiCQ/VGGT-Long/issues/6"),
    Card("24 GB", "RTX 4090", "23.61GiB", "pinokiofactory/flux-webui/issues/11"),
    Card("48 GB", "L40", "44.40GiB", "QwenLM/Qwen3-VL/issues/2097"),
    Card("80 GB", "H100", "79.11GiB", "vllm-project/vllm/issues/27508"),
)
NONE, TIGHT = "none", "(tight)"  # no card; a card where the allocator has to give back what lies idle


class Setting(NamedTuple):
    """Rows and tokens of a batch."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length:,}"


SETTINGS = (Setting(2, 2048), Setting(1, 1024))
# LoRA's memory: what LoRA freezes is frozen; the last rule is that of finetune(rank=32)
AS_LORA = (
    "*embed*: frozen; *norm*: frozen; lm_head*: frozen; *: random(rank=32, every=0, kind=orthonormal, side=long, clip=true)"
)
LORA = "LoRA (rank 32), adamw"  # as `lingrad memory compare` calls it
WAYS: dict[str, dict[str, Any]] = {  # options of a question; {rank} is a quarter of the model's width
    "AdamW, all weights": {"rules": "*: none", "base": "adamw"},
    "8-bit AdamW, all weights": {"rules": "*: none", "base": "adamw8bit"},
    "8-bit AdamW, all weights, layerwise": {"rules": "*: none", "base": "adamw8bit", "layerwise": True},
    LORA: {"rules": "svd(rank=32)"},
    "`finetune(rank=32)`": {"rules": "finetune(rank=32)", "mode": "adapter"},
    "`finetune(rank=32)`, the rest frozen": {"rules": AS_LORA, "mode": "adapter"},
    "`finetune(rank=32)`, the rest frozen, INT8": {"rules": AS_LORA, "mode": "adapter", "dtype": "int8"},
    "`galore(rank=width/4)`, 8-bit, layerwise": {"rules": "galore(rank={rank})", "base": "adamw8bit", "layerwise": True},
    "`q_galore(rank=width/4)`, INT8, layerwise": {"rules": "q_galore(rank={rank})", "dtype": "int8", "layerwise": True},
    "`power(rank=64)` with a residual": {"rules": "ldadam(rank=64, residual=scaled)"},
}


class Case(NamedTuple):
    """A run to simulate."""

    way: str
    question: Question

    @property
    def method(self) -> Any:
        """The method, where it is not that of the question."""
        return next(one for one in commands.methods(self.question) if one.label == LORA) if self.way == LORA else None

    @property
    def command(self) -> str:
        """What reproduces it on the command line. LoRA is a line of a comparison."""
        words = ["lingrad memory", "compare" if self.way == LORA else "simulate"]
        for field in fields(Question):
            value = getattr(self.question, field.name)
            if value != field.default:
                words.append(f"--{field.name}" if value is True else f"--{field.name} {_quoted(str(value))}")
        return " ".join(words)


def _quoted(text: str) -> str:
    return text if text.replace("-", "").isalnum() else f'"{text}"'


def cases() -> Iterator[Case]:
    """Every run, the larger batch and what is simulated fastest first."""
    for setting in SETTINGS:
        for way, options in WAYS.items():
            for model in MODELS:
                rules = options["rules"].format(rank=LLAMAS[model].hidden // 4)
                same = {"model": model, "batch": setting.batch, "length": setting.length, "checkpointing": True}
                yield Case(way, Question(**{**same, **options, "rules": rules}))


def measure(case: Case) -> Row:
    """Simulate a run.

    Args:
        case: The run.

    Returns:
        What identifies it, its figures in bytes, and the smallest card that it fits on.
    """
    report = commands.simulate(case.question, case.method)
    asked = case.question
    return {
        "way": case.way,
        "model": asked.model,
        "setting": str(Setting(asked.batch, asked.length)),
        "command": case.command,
        **{key: getattr(report, key) for key in ("peak", "steady", "reserved")},
        "card": smallest(case, report),
    }


def smallest(case: Case, report: MemoryReport) -> str:
    """The smallest card that a run fits on.

    Args:
        case: The run.
        report: What it takes where memory has no limit.

    Returns:
        Its name, or `NONE`.
    """
    for card in CARDS:
        left = _left(card)
        if report.peak > left:
            continue
        # an allocator at its limit gives back what lies idle, so that less than was reserved may do
        limited = replace(case.question, capacity=card.capacity)
        if (report.reserved or 0) <= left or commands.simulate(limited, case.method).fits:
            return card.name
    return NONE


def blocks(result: Mapping[str, Any]) -> dict[str, str]:
    """What the page shows.

    Args:
        result: What `main` has written.

    Returns:
        Name of the marks -> Markdown.
    """
    rows, versions = result["rows"], ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    found = {f"largest-{setting.length}": _largest(rows, setting) for setting in SETTINGS}
    found |= {model: _table([row for row in rows if row["model"] == model]) for model in MODELS}
    sources = [f"[{card.source}](https://github.com/{card.source})" for card in CARDS]
    cards = [
        (card.name, card.example, card.capacity.replace("GiB", " GiB"), readable(_left(card)), source)
        for card, source in zip(CARDS, sources, strict=True)
    ]
    found["cards"] = markdown([("card", "such as", "torch finds", "left for tensors", "as reported in"), *cards])
    missing = sum(1 for _ in cases()) - len(rows)
    others = (
        f"; {missing} more have no figures yet: their cells are empty, or `or more` stands where a larger model may fit"
        if missing
        else ""
    )
    found["made"] = f"{len(rows)} runs, simulated with {versions}{others}.\n"
    return found | {"measured": _measured()}


def _largest(rows: Sequence[Row], setting: Setting) -> str:
    """For each method and card, the largest model that fits; methods without figures of the smallest model are left out."""
    order, lines = [card.name for card in CARDS], [["method", *(card.name for card in CARDS)]]
    for way in WAYS:
        mine = {row["model"]: row for row in rows if (row["way"], row["setting"]) == (way, str(setting))}
        known = [mine[model] for model in takewhile(mine.__contains__, MODELS)]
        cells = []
        for number, name in enumerate(order):
            fitting = [row for row in known if row["card"] in order[: number + 1]]
            text = _size(fitting[-1]["model"]) if fitting else ""
            text += " or more" if len(fitting) == len(known) < len(MODELS) else ""
            text += f" {TIGHT}" if fitting and fitting[-1]["card"] == name and _is_tight(fitting[-1]) else ""
            cells.append(text)
        lines += [[way, *cells]] if known else []
    return markdown(lines) if len(lines) > 1 else "There are no figures yet.\n"


def _left(card: Card) -> int:
    return parse_bytes(card.capacity) - parse_bytes(CONTEXT)


def _is_tight(row: Row) -> bool:
    return any(row["card"] == card.name and row["reserved"] > _left(card) for card in CARDS)


def _size(model: str) -> str:
    return model.partition("-")[2].upper()


def _table(rows: Sequence[Row]) -> str:
    """The runs of a model: a line for each method, with both settings."""
    made = {row["setting"] for row in rows}
    settings = [setting for setting in SETTINGS if str(setting) in made]
    lines = [["method", *(f"{setting}: {what}" for setting in settings for what in ("peak", "reserved", "card")), "command"]]
    for way in WAYS:
        mine = {row["setting"]: row for row in rows if row["way"] == way}
        if str(SETTINGS[0]) in mine:  # its command is shown
            cells = [cell for setting in settings for cell in _figures(mine.get(str(setting)))]
            lines.append([way, *cells, f"`{mine[str(SETTINGS[0])]['command']}`"])
    return markdown(lines)


def _figures(row: Row | None) -> tuple[str, str, str]:
    """Peak, reserved, card; empty where there are none yet."""
    if row is None:
        return "", "", ""
    return readable(row["peak"]), readable(row["reserved"]), row["card"] + f" {TIGHT}" * _is_tight(row)


def _measured() -> str:
    """What a GPU has confirmed: other runs than these."""
    if not MEASURED.is_file():
        return "No simulated figure has been confirmed on a GPU.\n"
    found = read_json(MEASURED)
    large = []
    for row in found["rows"]:
        if row["label"].startswith("7B: "):
            peaks = [f"{readable(row[what]['peak'])} {what}" for what in ("simulated", "measured")]
            large.append(f"{row['label'].removeprefix('7B: ')}: {', '.join(peaks)}")
    return (
        f"What a GPU has confirmed are other runs, {len(found['rows'])} on one {found['device']}, most of them of a small "
        f"model ([memory](memory.md#on-a-real-gpu)). {apart(found)}\n"
        f"Those of 7B, by what was asked for: {'; '.join(large)}.\n"
    )


def draw(rows: Sequence[Row]) -> bytes:
    """What every method takes of a card, for each model, in the first setting.

    Args:
        rows: The runs.

    Returns:
        A PNG.
    """
    figure, (axes,) = plotting.figure((10.0, 5.0))
    context = parse_bytes(CONTEXT)
    places = {way: -place for place, way in enumerate(WAYS)}
    for model, marker in zip(MODELS, "o^s", strict=True):
        mine = [row for row in rows if (row["model"], row["setting"]) == (model, str(SETTINGS[0]))]
        taken = [(row["reserved"] + context) / 2**30 for row in mine]
        axes.plot(taken, [places[row["way"]] for row in mine], marker, label=_size(model), markersize=8)
    ends = [parse_bytes(card.capacity) / 2**30 for card in CARDS]
    for end in ends:
        axes.axvline(end, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(ends, [card.name for card in CARDS])
    axes.set_xticks([], minor=True)
    axes.set_yticks(list(places.values()), [way.replace("`", "") for way in places])
    axes.grid(axis="y", linewidth=0.3)
    axes.set(xlabel=f"reserved, and {readable(context)} for the CUDA context; {SETTINGS[0]} tokens; lines: what torch finds")
    figure.legend(loc="outside upper right", ncols=len(MODELS), title="model")
    return plotting.picture(figure)


def main() -> None:
    """Simulate what has no figures yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the page only, from docs/hardware.json")
    torch.set_num_threads(1)
    settings = {"versions": {name: version(name) for name in PACKAGES}, "cards": [list(card[:3]) for card in CARDS]}
    settings["context"] = CONTEXT
    result: dict[str, Any] = read_json(RESULT) if RESULT.is_file() else {}
    if not parser.parse_args().tables:
        if any(result.get(key) != value for key, value in settings.items()):
            result = {**settings, "rows": []}
        fill(result)
    write_whole(PICTURE, draw(result["rows"]))
    put(PAGE, blocks(result))
    print(f"{PAGE.relative_to(ROOT)} now holds these figures")


def fill(result: dict[str, Any]) -> None:
    """Simulate the runs that have no row in a result, and write it after each.

    Args:
        result: With the rows that there are, in any order; changed in place.
    """
    known = {row["command"]: row for row in result["rows"]}
    wanted = list(cases())
    todo = [case for case in wanted if case.command not in known]
    begin = time.perf_counter()
    for done, case in enumerate(todo, 1):
        row = known[case.command] = measure(case)
        result["rows"] = [known[one.command] for one in wanted if one.command in known]
        write_whole(RESULT, (json.dumps(result, indent=1) + "\n").encode())
        left = (time.perf_counter() - begin) / done * (len(todo) - done) / 60
        name = f"{row['model']}, {row['setting']}, {row['way']}"
        print(f"{done} of {len(todo)}, {left:.0f} min left  {name}: {readable(row['peak'])}, card {row['card']}", flush=True)


if __name__ == "__main__":
    main()
