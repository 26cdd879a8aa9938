"""docs/architecture.md is true: every file and name exists, and each walk's functions are called in the order it says."""

import re
import sys
from pathlib import Path

import torch
from torch import nn

import lingrad

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/architecture.md").read_text()
ITEM = re.compile(r"^\d+\. `(lingrad/[\w/]+\.py)`(.*?)(?=^\d+\. |\n\n|\Z)", re.MULTILINE | re.DOTALL)


def defined(path):
    """The names that a file defines, methods with their class."""
    import ast

    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


def section(title, part=None):
    """(file, name) of each item of a walk; ``part`` are words of the paragraph before the list."""
    text = TEXT.split(f"\n## {title}")[1].split("\n## ")[0]
    if part is not None:
        text = text.split(part)[1]
        text = text[text.index("\n1. ") :]
        text = text[: re.search(r"\n\n(?!\d)", text).start()] if re.search(r"\n\n(?!\d)", text) else text
    found = []
    for path, rest in ITEM.findall(text):
        names = [name for name in re.findall(r"`([\w.]+)`", rest) if name in defined(path)]
        assert names, (path, rest)
        found += [(path, name) for name in names]
    return found


def calls(program):
    """(file, name) of every function of the package that a program enters, in order."""
    found = []

    def note(frame, event, _):
        if event == "call" and "/lingrad/" in frame.f_code.co_filename:
            path = "lingrad/" + frame.f_code.co_filename.rpartition("/lingrad/")[2]
            code = frame.f_code  # of Python 3.10 without the class
            found.append((path, getattr(code, "co_qualname", code.co_name)))

    sys.setprofile(note)
    try:
        program()
    finally:
        sys.setprofile(None)
    return found


def assert_in_order(walk, seen):
    at = 0
    if sys.version_info < (3, 11):
        walk = [(path, name.rpartition(".")[2]) for path, name in walk]
    for step in walk:
        assert step in seen[at:], f"{step} is not called after {walk[: walk.index(step)]}"
        at = seen.index(step, at)


def run(rules, make=lingrad.wrap, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)).double()
    opt = make(model, rules, lr=1e-2, **options)

    def step():
        opt.zero_grad()
        model(torch.ones(4, 8, dtype=torch.float64)).square().sum().backward()
        opt.step()

    return opt, step


class TestWalks:
    def test_the_life_of_a_gradient(self):
        opt, step = run({"0": "svd(rank=2)"})
        step()  # the first one refreshes
        assert_in_order(section("Walk 1"), calls(step))
        assert all(not sub.basis.due for sub in opt.subspaces)

    def test_a_refresh_from_the_gradient(self):
        _, step = run({"0": "svd(rank=2, every=1)"}, carry="rotate", ledger=True, make=lingrad.adapt)
        step()
        assert_in_order(section("Walk 2", "reads the gradient"), calls(step))

    def test_a_refresh_from_a_sketch(self):
        _, step = run({"0": "power(rank=2, every=1)"})
        assert_in_order(section("Walk 2", "reads a sketch"), calls(step))

    def test_a_refresh_from_nothing(self):
        _, step = run({"0": "random(rank=2, every=1)"})
        assert_in_order(section("Walk 2", "reads nothing"), calls(step))

    def test_a_checkpoint(self):
        opt, step = run({"0": "svd(rank=2)"}, ledger=True)
        step()
        assert_in_order(section("Walk 3", "Saving:"), calls(opt.state_dict))
        state = opt.state_dict()
        assert_in_order(section("Walk 3", "Loading:"), calls(lambda: opt.load_state_dict(state)))


def test_every_file_and_class_that_the_page_names_exists():
    for path in set(re.findall(r"`((?:lingrad|tests)/[\w/]+\.\w+)`", TEXT)):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+)", TEXT, re.MULTILINE):
        for name in re.findall(r"`([\w./]+)`", path):
            if name != "level":
                assert (ROOT / "lingrad" / name).exists(), name
    for path, rest in ITEM.findall(TEXT.split("## The engine")[1].split("\n## ")[0]):
        assert any(name in defined(path) for name in re.findall(r"`([\w.]+)`", rest)) or path.count("engine"), (path, rest)


def test_the_table_has_the_levels_of_the_import_contract():
    text = (ROOT / "pyproject.toml").read_text().split("layers = [")[1].split("]")[0]
    levels = [{name.strip() for name in level.split("|")} - {"__main__"} for level in re.findall(r'"(.*)"', text)]
    rows = re.findall(r"^\| ((?:`[\w./]+`(?:, )?)+) \|", TEXT, re.MULTILINE)
    assert [{name.removesuffix(".py").strip("/") for name in re.findall(r"`([\w./]+)`", row)} for row in rows] == [
        level for level in levels if level
    ]
