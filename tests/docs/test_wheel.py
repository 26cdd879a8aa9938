"""The wheel: what a package index shows of it, and the tutorials from an empty folder with nothing else of this repository."""

import email
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
import torch

from tests.support.docs.pages import DOCS, assert_adapter_is_the_model, assert_learned, blocks, commands

ROOT = DOCS.parent
BLOB, RAW = "https://github.com/lingrad/lingrad/blob/main/", "https://raw.githubusercontent.com/lingrad/lingrad/main/"


def done(command, folder, **options):
    """Run a command that must succeed; returns what it prints."""
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200, **options)
    assert found.returncode == 0, f"{shlex.join(map(str, command[:5]))}: {found.stdout[-2000:]}{found.stderr[-4000:]}"
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built without a network by what the extra `dev` brings."""
    out = tmp_path_factory.mktemp("dist")
    done([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], ROOT)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    done([*pip, "--target", folder, wheel], folder)
    return folder


@pytest.fixture(scope="module")
def page(wheel):
    """The description in the wheel's metadata, which a package index shows."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    return metadata.get_payload(decode=True).decode()


class TestIndexPage:
    def test_it_is_the_readme(self, page):
        readme = (ROOT / "README.md").read_text()
        assert re.sub(r"\]\([^)]*\)", "]()", page).split() == re.sub(r"\]\([^)]*\)", "]()", readme).split()

    def test_no_link_or_image_is_relative_and_each_leads_somewhere(self, page):
        found = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", page)
        assert len(found) == page.count("](") > 30
        assert "<img" not in page
        assert "<a " not in page
        for image, address in found:
            assert address.startswith(("https://", "#")), address
            assert not image or address.startswith(RAW), address
            path, _, heading = address.removeprefix(RAW if image else BLOB).partition("#")
            if not path.startswith("https://"):
                assert (ROOT / path).is_file() if path else heading, address
                text = (ROOT / (path or "README.md")).read_bytes()
                assert not heading or heading in slugs(text.decode()), address


def slugs(page):
    """What GitHub calls the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found]


@pytest.fixture
def reader(target, tmp_path):
    return Reader(target, tmp_path)


class Reader:
    """Somebody in an empty folder, who has installed the wheel and types what a page says.

    Args:
        target: The folder that the wheel is installed into.
        folder: The empty folder.
    """

    def __init__(self, target, folder):
        self.target, self.folder = target, folder
        path = os.pathsep.join([str(target / "bin"), os.environ["PATH"]])
        self.env = os.environ | {"PYTHONPATH": str(target), "PATH": path, "HF_HUB_OFFLINE": "1"}

    def python(self, code, result="None"):
        """Type blocks of Python, one after another, in one session.

        Args:
            code: The blocks.
            result: An expression.

        Returns:
            Its value at the end, through JSON; and what the blocks have printed.
        """
        ours = f"""
import json, sys, lingrad
assert lingrad.__file__.startswith({str(self.target)!r}), lingrad.__file__
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
strays = [file for file in files if file.startswith({str(ROOT) + os.sep!r}) and not file.startswith(sys.prefix)]
assert not strays, strays
print()
print(json.dumps({result}))
"""
        *printed, value = done([sys.executable, "-"], self.folder, input="\n".join([*code, ours]), env=self.env).splitlines()
        return json.loads(value), "\n".join(printed)

    def type(self, command):
        """Type a command; a comment at its end is left out."""
        return done(shlex.split(command, comments=True), self.folder, env=self.env)

    def files(self):
        """What is in the folder now."""
        return {path.name for path in self.folder.iterdir()}


@pytest.mark.slow
class TestTutorials:
    def test_readme(self, reader):
        loss, _ = reader.python(blocks("../README.md"), "loss.item()")
        assert loss < 1  # 2 is that of a model that gives zeros
        (command,) = re.findall(r"^`(lingrad memory simulate .*?)`", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
        assert re.search(r"^all +19\.5\d GiB", reader.type(command), flags=re.MULTILINE)  # its table says 19.5
        assert not reader.files()

    def test_quickstart(self, reader):
        pytest.importorskip("trl")
        pytest.importorskip("bitsandbytes")
        history, printed = reader.python(blocks("quickstart.md"), "trainer.state.log_history")
        assert_learned(history)
        assert " plus " in printed  # an answer by PEFT of the kind that was trained
        assert {path.name for path in (reader.folder / "tuned/adapter").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }

    def test_loop(self, reader):
        pytest.importorskip("lightning")
        reader.python(blocks("loop.md"))  # they compare losses and weights themselves
        made = {"run.pt", "start", "adapter", "final", "accelerated", "accelerated-final", "lightning.ckpt", "lightning-final"}
        assert reader.files() == made
        assert_adapter_is_the_model(reader.folder, torch.arange(64).view(4, 16))

    def test_from_galore(self, reader):
        replaced, rewritten = blocks("from-galore.md")
        losses, _ = reader.python([replaced, "first = loss.item()", rewritten], "[first, loss.item()]")
        assert max(losses) < 1.5  # as in the readme, after 100 steps
        assert abs(losses[0] - losses[1]) < 0.05  # the same run but for eps and signs

    def test_research(self, reader):
        pytest.importorskip("optuna")
        (plan,) = blocks("research.md", "toml")
        (reader.folder / "plan.toml").write_text(plan)
        reader.python(blocks("research.md"))
        run, report, again, _ = commands("research.md")  # the last is for a clone, which the page says
        assert "# --quick" in run
        reader.type(run.partition("#")[0] + "--quick")
        text = (reader.folder / "runs/maps/report.md").read_text()
        assert all(f"| {name}" in text for name in ("LoRA", "GaLore", "random, adapter mode"))
        reader.type(report)
        reader.type("lingrad report runs/maps --publish maps.json")
        assert "`lingrad report runs/maps --publish maps.json`" in (DOCS / "research.md").read_text()
        reader.type(again)
        assert {path.name for path in (reader.folder / "runs/again").iterdir()} >= {"report.html", "report.md", "runs"}

    def test_serving(self, reader):
        _, printed = reader.python(blocks("serving.md"))
        assert re.search(r"tensor\(\[\[[\d, ]+\]\]\)", printed)  # what PEFT generates
        says = [reader.type(command) for command in commands("serving.md")]
        assert re.search(r"vllm +loads", says[1])
        assert reader.files() == {"START", "served", "RUN", "LORA", "MERGED"}
        assert "vllm serve owner/name --enable-lora --max-lora-rank 8" in says[0]
        assert (reader.folder / "MERGED/model.safetensors").is_file()


def test_headings_are_called_as_on_github():
    assert slugs("# One `two` (3)\n## 7B in INT8, on 16 GiB\ntext\n### a-b") == ["one-two-3", "7b-in-int8-on-16-gib", "a-b"]


def test_every_tutorial_is_typed_here():
    named = re.findall(r"^  - Tutorials:\n((?:      - .*\n)+)", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = re.findall(r": ([\w-]+)\.md", named[0])
    assert {f"test_{page.replace('-', '_')}" for page in pages} <= set(vars(TestTutorials)), pages
