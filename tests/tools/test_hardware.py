"""What fits on which card: the page, its commands, and one run again."""

import json
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lingrad.memory import commands
from lingrad.methods import Lora
from tools import measure_hardware as hardware

GIB = 2**30
CASES = list(hardware.cases())
RESULT = json.loads(hardware.RESULT.read_text())
PAGE = hardware.PAGE.read_text()


def test_the_page_has_the_figures():
    for name, block in hardware.blocks(RESULT).items():
        assert f"<!-- {name}:begin -->\n{block}<!-- {name}:end -->" in PAGE, "python tools/measure_hardware.py --tables"
    (text, picture) = re.search(r"!\[(.+)\]\((.+)\)", PAGE).groups()
    assert picture == hardware.PICTURE.name
    assert all(hardware._size(model) in text for model in hardware.MODELS)
    assert hardware.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_every_row_is_of_a_run():
    order = [case.command for case in CASES]
    made = [row["command"] for row in RESULT["rows"]]
    assert made == [command for command in order if command in made]
    assert {row["way"] for row in RESULT["rows"]} == set(hardware.WAYS)
    assert len({case.command for case in CASES}) == len(CASES)
    assert [tuple(card) for card in RESULT["cards"]] == [card[:3] for card in hardware.CARDS]
    for row in RESULT["rows"]:
        assert row["steady"] <= row["peak"] <= row["reserved"]


def test_every_row_of_the_page_ends_with_its_command():
    for model in hardware.MODELS:
        table = PAGE.split(f"<!-- {model}:begin -->\n")[1].split(f"<!-- {model}:end -->")[0]
        shown = re.findall(r"\| +`(lingrad memory [^`]+)` \|$", table, flags=re.MULTILINE)
        of_model = [row["command"] for row in RESULT["rows"] if row["model"] == model and row["setting"] == "2 x 2,048"]
        assert shown == of_model


@pytest.mark.thinned(6)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.question.model}-{case.question.length}-{case.way}")
def test_the_command_asks_what_was_simulated(case, lingrad, monkeypatch):
    asked = []

    def answer(question):
        asked.append(question)
        return SimpleNamespace(fits=None, plot=None, to_snapshot=None, to_json=lambda: "{}")

    name = "compare" if case.method else "simulate"
    monkeypatch.setattr(commands, name, answer)
    program, *arguments = shlex.split(case.command)
    assert (program, *arguments[:2]) == ("lingrad", "memory", name)
    assert lingrad(*arguments, "--json", "-")[0] == 0
    assert asked == [case.question]


def test_lora_is_a_line_of_the_comparison():
    case = next(case for case in CASES if case.way == hardware.LORA)
    assert case.method == Lora(32)
    assert [method.label for method in commands.methods(case.question)].count(hardware.LORA) == 1


def test_a_run_again_gives_the_same_bytes():
    row = next(row for row in RESULT["rows"] if row["model"] == "llama-1b")
    assert hardware.measure(next(case for case in CASES if case.command == row["command"])) == row


class TestTheSmallestCard:
    CASE = CASES[0]

    @pytest.fixture
    def asked(self, monkeypatch):
        """What was simulated with a limit, by capacity; the answer is that it fits on 16 GB and more."""
        found = []

        def simulate(question, method):
            assert replace(question, capacity=None) == self.CASE.question
            assert method is None
            found.append(question.capacity)
            return SimpleNamespace(fits=question.capacity == "15.61GiB")

        monkeypatch.setattr(commands, "simulate", simulate)
        return found

    def find(self, peak, reserved):
        return hardware.smallest(self.CASE, SimpleNamespace(peak=int(peak * GIB), reserved=int(reserved * GIB)))

    def test_what_is_reserved_decides(self, asked):
        assert self.find(7.0, 7.25) == "8 GB"  # 7.75 GiB less 512 MiB
        assert self.find(20.0, 23.11) == "24 GB"
        assert asked == []

    def test_at_its_limit_the_allocator_may_do_with_less(self, asked):
        assert self.find(11.0, 15.2) == "16 GB"
        assert asked == ["11.75GiB", "15.61GiB"]

    def test_a_peak_that_is_larger_than_a_card_is_not_tried(self, asked):
        assert self.find(79.0, 80.0) == hardware.NONE
        assert asked == []


def row(model, card, reserved, *, way="AdamW, all weights", setting="2 x 2,048"):
    return {
        "way": way,
        "model": model,
        "setting": setting,
        "card": card,
        "peak": 1,
        "reserved": int(reserved * GIB),
        "command": "c",
    }


def test_the_largest_model_of_a_card():
    rows = [row("llama-1b", "12 GB", 11.5), row("llama-7b", "48 GB", 40), row("llama-13b", hardware.NONE, 99)]
    others = [row("llama-13b", "8 GB", 5, setting="1 x 1,024"), row("llama-1b", "8 GB", 5, way=hardware.LORA)]
    table = hardware._largest([*rows, *others], hardware.SETTINGS[0])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[2] == ["AdamW, all weights", "", "1B (tight)", "1B", "1B", "7B", "7B"]
    assert lines[3:] == [[hardware.LORA, *["1B or more"] * 6]]


def test_it_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    few, made = CASES[:4], []

    def measure(case):
        if len(made) == 2:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(case.command)
        return {"command": case.command, "model": "m", "setting": "s", "way": case.way, "peak": 1, "card": "8 GB"}

    monkeypatch.setattr(hardware, "RESULT", tmp_path / "hardware.json")
    monkeypatch.setattr(hardware, "cases", lambda: iter(few))
    monkeypatch.setattr(hardware, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        hardware.fill({"rows": []})
    result = json.loads(hardware.RESULT.read_text())
    assert [line["command"] for line in result["rows"]] == [case.command for case in few[:2]]
    hardware.fill(result)
    assert made == [few[0].command, few[1].command, "stopped", few[2].command, few[3].command]
    assert [line["command"] for line in json.loads(hardware.RESULT.read_text())["rows"]] == [case.command for case in few]


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "MEASURED", tmp_path / "none.json")
    assert hardware._measured() == "No simulated figure has been confirmed on a GPU.\n"
