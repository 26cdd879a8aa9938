"""The package as a stranger meets it: what an import pulls in, the public names, a transform from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lingrad
from lingrad.config import spec
from tests.support.models import llama, text_batches

ROOT = Path(__file__).parents[2]


def test_import_pulls_in_nothing_beyond_torch_and_einops():
    program = (
        "import sys, torch, einops; before = {m.partition('.')[0] for m in sys.modules}; import lingrad;"
        "print(*sorted({m.partition('.')[0] for m in sys.modules} - before - set(sys.stdlib_module_names)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["lingrad"]


def test_optional_packages_stay_optional():
    """Training works where no optional package can be imported at all."""
    program = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'bitsandbytes', 'typer', 'rich', 'matplotlib', 'lion_pytorch', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "import torch, lingrad\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "opt = lingrad.wrap(model, 'svd(rank=2)', lr=0.1)\n"
        "model(torch.ones(1, 4)).sum().backward(); opt.step(); opt.switch('adapter'); print('trained')"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "trained\n"


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert lingrad.__version__ == version("lingrad")


def test_no_eval_no_pickle_no_network():
    """Nothing in the package evaluates text, loads pickles or opens a connection."""
    opens_pickles = ("import pickle", "from pickle", "pickle.load", "Unpickler", "import dill")  # messages may name them
    connects = ("urllib", "import requests", "socket", "trust_remote_code=True")
    forbidden = ("eval(", "exec(", *opens_pickles, "torch.load(", *connects)
    reads_safely = (ROOT / "lingrad/hf/mixin.py", ROOT / "lingrad/subspaces/sealing.py")  # tensors and plain values only
    for path in (ROOT / "lingrad").rglob("*.py"):
        code = re.sub(r"[\w)]\.eval\(", "", path.read_text()).replace('mode="eval"', "")  # a module's eval() is another
        code = code.replace("import pickletools", "")  # it lists the operations of a pickle, and runs none
        found = {word for word in forbidden if word in code}
        if path in reads_safely:
            calls = re.findall(r"torch\.load\(([^\n]*)\)", code)
            assert calls, path
            assert all("weights_only=True" in call for call in calls), path
            found -= {"torch.load("}
        if path.name == "snapshot.py":  # torch's visualiser reads pickles; ours refuses every name one holds, as its tests show
            found -= set(opens_pickles)
        if path == ROOT / "lingrad/decentralized/torchft.py":  # workers that are told of each other; plain values only
            assert "weights_only=True" in code
            found -= {"urllib"}
        assert not found, path


class TestExamplePackage:
    """examples/transform_package: one class in one file, found by its entry point; nothing imports it."""

    def test_it_is_found_by_name(self):
        assert "topnorm" in spec.registry.transform_names()
        transform = spec.parse("topnorm(rank=4, every=7, power=1)")
        assert type(transform).__module__ == "lingrad_topnorm"
        assert spec.format(transform) == "topnorm(rank=4, every=7, power=1.0)"

    @pytest.mark.parametrize("side", ["short", "both"])
    def test_it_trains_in_both_modes(self, side):
        from tests.support.models import gap, three_ways

        text = f"topnorm(rank=4, every=7, side={side})"
        wrapped, adapted, switched = three_ways(llama, text, "adamw", text_batches(16), lr=1e-2, weight_decay=0.1)
        assert gap(adapted, wrapped) <= 1e-12
        assert gap(switched, wrapped) <= 1e-12

    def test_it_is_one_file(self):
        files = [p.name for p in (ROOT / "examples/transform_package").rglob("*.py")]
        assert files == ["__init__.py"]

    def test_it_keeps_the_rows_with_the_largest_gradients(self):
        import torch

        from lingrad.gradients.local import DenseGradient
        from lingrad.transforms import When

        transform = spec.parse("topnorm(rank=2, side=left)")
        state = transform.init((4, 3), seed=0, device=torch.device("cpu"), dtype=torch.float32)
        grad = torch.tensor([[1.0, 0, 0], [0, 3, 0], [0, 0, 0], [2, 2, 0]])
        state = transform.refresh(state, DenseGradient(grad), When(0, 0, 0, grad.shape))
        assert state.left.t().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


class TestContributing:
    """The two transforms of the page, from its text: what the page promises of them."""

    each = pytest.mark.parametrize("name", ["mine", "sketched"])

    @pytest.fixture(autouse=True)
    def contributed(self, monkeypatch):
        registry = spec.registry
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
        before = set(registry.transform_names())
        for block in blocks:
            exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "contributed"})  # noqa: S102 - our own text
        reads = {name: registry.find_transform(name)(rank=4).reads for name in set(registry.transform_names()) - before}
        assert reads == {"mine": "gradient", "sketched": "sketch"}
        assert all(len(block.split("class ")[1].splitlines()) <= 15 for block in blocks)

    @each
    @pytest.mark.parametrize("side", ["short", "long", "left", "right", "both"])
    def test_it_trains_in_both_modes(self, name, side):
        from lingrad.testing import assert_dual

        assert_dual(f"{name}(rank=4, every=5, side={side})")

    @each
    def test_explain_shows_it(self, name):
        from lingrad.config.explain import explain

        text = f"{name}(rank=4, every=5)"
        lines = explain(llama(), text).lines
        shown = {line.basis for line in lines if line.transform == text}
        assert shown == {"32 x 4", "16 x 4"}

    @each
    @pytest.mark.parametrize("mode", ["optimizer", "adapter"])
    @pytest.mark.parametrize("side", ["short", "both"])
    def test_its_memory_is_estimated_and_simulated(self, name, mode, side):
        import torch

        from lingrad import memory
        from lingrad.testing import every_kind, token_loss

        def loss(model):
            return token_loss(model, torch.zeros(4, 5, dtype=torch.long, device="meta"))

        rules = {"head": "none", "*": f"{name}(rank=4, side={side})"}
        simulated = memory.simulate(lambda: every_kind(torch.float32), rules, "adamw", mode, loss=loss, lr=1e-3)
        with torch.device("meta"):
            model = every_kind(torch.float32)
        estimated = memory.estimate(model, rules, "adamw", mode, lr=1e-3)
        assert estimated.totals == simulated.steady_breakdown
        assert estimated.totals["basis"] > 0

    @each
    @pytest.mark.parametrize("make", [lingrad.wrap, lingrad.adapt])
    def test_a_checkpoint_resumes_to_the_bit(self, name, make, tmp_path):
        import torch

        from lingrad.testing import every_kind, token_batches, token_loss, train

        batches = token_batches(8)

        def started():
            model = every_kind(torch.float32)
            return model, make(model, {"*": f"{name}(rank=4, every=3)"}, lr=1e-2)

        def run(model, optimizer, steps):
            train(model, optimizer, steps, token_loss, schedule=False)
            return {key: weight.clone() for key, weight in optimizer.weights().items()}

        expected = run(*started(), batches)
        model, optimizer = started()
        run(model, optimizer, batches[:4])
        torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
        model, optimizer = started()
        saved = torch.load(tmp_path / "run.pt", weights_only=True)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        found = run(model, optimizer, batches[4:])
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class TestReadme:
    TEXT = (ROOT / "README.md").read_text()

    def test_its_first_screen(self):
        """What it is in two sentences, how to install it, and a start; then the two commands of the demo."""
        title, first, install, *_ = self.TEXT.split("\n\n")
        assert title == "# lingrad"
        assert first.count(". ") + first.endswith(".") == 2
        assert install.startswith('```sh\npip install "lingrad[hf,cli] @ git+https://')
        assert "pip install lingrad" not in self.TEXT  # it is not on the index
        blocks = [block.split() for block in self.TEXT.split("```")[1::2]]
        assert [block[0] for block in blocks[:2]] == ["sh", "python"]
        assert blocks[2] == ["sh", "make", "demo", "make", "test"]

    def test_its_example_runs_and_learns(self):
        code = self.TEXT.split("```python\n")[1].split("```")[0]
        assert len(code.strip().splitlines()) <= 15
        names = {}
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own text
        assert float(names["loss"].detach()) < 0.5
        assert not hasattr(names["model"][0], "lingrad")

    def test_its_table_is_that_of_the_recorded_run(self):
        from tools.update_readme import tables

        text, *pictures = tables(ROOT / "docs/demo/result.json")
        assert f"<!-- demo:begin -->\n{text}<!-- demo:end -->" in self.TEXT
        assert (ROOT / "docs/demo/table.md").read_text() == text
        assert all(picture.startswith(b"\x89PNG") for picture in pictures)

    @pytest.mark.parametrize(("name", "page"), [("finetune", "README.md"), ("smollm2", "docs/lowbit.md")])
    def test_tables_of_examples_are_those_of_recorded_runs(self, name, page):
        import json

        table = (ROOT / f"docs/examples/{name}.md").read_text()
        assert f"<!-- {name}:begin -->\n{table}<!-- {name}:end -->" in (ROOT / page).read_text()
        result = json.loads((ROOT / f"docs/examples/{name}.json").read_text())
        assert f"{result['seconds']:.0f} s" in table

    def test_files_it_links_to_exist(self):
        import re

        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


class TestDocs:
    def test_every_config_string_in_the_docs_is_valid(self):
        import re

        found = 0
        for page in ("README.md", "docs/index.md", "docs/config.md", "docs/transforms.md", "docs/performance.md"):
            for text in re.findall(r"`((?:svd|power|random|slice|pca|kron|full|topnorm)\([^`]*\))`", (ROOT / page).read_text()):
                assert spec.parse(text) == spec.parse(spec.format(spec.parse(text))), text
                found += 1
        assert found >= 10

    def test_every_transform_has_a_section_that_names_its_options(self):
        import dataclasses

        page = (ROOT / "docs/transforms.md").read_text()
        shared = page.split("## Common options")[1].split("\n## ")[0]
        for name in spec.registry.transform_names():
            cls = spec.registry.find_transform(name)
            if not cls.__module__.startswith("lingrad."):
                continue
            section = page.split(f"\n## `{name}`")[1].split("\n## ")[0]
            for option in dataclasses.fields(cls):
                assert f"`{option.name}`" in section + shared, (name, option.name)

    def test_python_on_the_config_page_runs(self):
        import re

        from tests.support.models import zoo, zoo_batches

        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/config.md").read_text(), flags=re.DOTALL)
        assert len(blocks) == 5
        runs = []
        for block in blocks:
            names = {"lingrad": lingrad, "model": zoo(), "batches": zoo_batches(1)[0]}
            exec(compile(block.replace('rank=64)", lr', 'rank=4)", lr'), "docs/config.md", "exec"), names)  # noqa: S102 - our own text
            runs += [names["opt"]] if "opt" in names else []
        groups, two_rates = ({g["name"]: g["lr"] for g in opt.param_groups} for opt in runs)
        assert groups == {"0.coords": 1e-2, "1.matrices": 1e-3}
        assert two_rates == {"coords": 1e-2, "matrices": 1e-3, "vectors": 1e-3}

    def test_python_on_the_index_page_runs(self, tmp_path, monkeypatch):
        import re

        import torch

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
        first, *blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/index.md").read_text(), flags=re.DOTALL)
        assert len(blocks) == 3
        names = {}
        exec(compile(first.replace("300", "3").replace("150", "1"), "docs/index.md", "exec"), names)  # noqa: S102 - our own text
        assert names["opt"].mode is None
        for block in blocks:
            names = {"lingrad": lingrad, "torch": torch, "model": llama()}
            lines = block.replace("rank=128", "rank=4").splitlines()
            if "torch.save" in block:
                names["opt"] = lingrad.wrap(names["model"], "svd(rank=4)", lr=1e-3)
                lines.insert(2, "opt.detach()")
            if "lingrad.adapt" in block:  # two calls that are shown side by side
                lines = [line for line in lines if "wrap" not in line]
            exec(compile("\n".join(lines), "docs/index.md", "exec"), names)  # noqa: S102 - our own text

    def test_python_on_the_page_of_methods_runs(self):
        import re

        policies, schedules = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(), flags=re.DOTALL)
        names = {}
        exec(compile(policies, "docs/methods.md", "exec"), names)  # noqa: S102 - our own text
        assert (names["opt"].settings.carry, names["opt"].settings.residual) == ("transport", "scaled")
        names["opt"].detach()
        exec(compile(schedules, "docs/methods.md", "exec"), names)  # noqa: S102 - our own text
        assert names["opt"].next_refreshes() == {"0.weight": (0, 50, True)}

    def test_python_on_the_duality_page_runs(self):
        import re

        (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/duality.md").read_text(), flags=re.DOTALL)
        exec(compile(block, "docs/duality.md", "exec"), {})  # noqa: S102 - our own text

    def test_config_page_shows_messages_as_they_are(self):
        page = (ROOT / "docs/config.md").read_text()
        for text in ("svd(rnak=128, every=200)", "random(rank=4, kind=gausian)"):
            with pytest.raises(spec.SpecError) as caught:
                spec.parse(text)
            assert str(caught.value) in page
