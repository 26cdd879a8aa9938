"""Break the package in one place at a time and see that a test notices: ``python tools/mutants.py``."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 600  # for one run of pytest; a mutant that never ends is killed too

# which tests to try first
MAPS, BACKWARD, OPTIMIZER = ("tests/test_maps.py",), ("tests/test_backward.py",), ("tests/test_optimizer.py",)
HAND = ("tests/test_optimizer.py::test_a_step_by_hand",)
CLIPPING = ("tests/test_optimizer.py::TestClipping",)
ZERO_GRAD = ("tests/test_optimizer.py::TestZeroGrad", *OPTIMIZER)
UNUSUAL = ("tests/test_optimizer.py::TestUnusualGradients", *OPTIMIZER)
STRUCTURE = ("tests/test_optimizer.py::TestStructure",)
CHECKPOINT, RESUMES = ("tests/test_checkpoint.py",), ("tests/test_checkpoint.py::test_resuming_is_exact",)
REFERENCE, GALORE, PARALLEL = ("tests/test_reference.py",), ("tests/test_galore.py",), ("tests/test_parallel.py",)
BASES, TRANSFORMS = ("tests/test_bases.py",), ("tests/test_transforms.py",)

# what a mutant meets that these let pass: everything fast that is about numbers, state and structure
WIDE = (
    "tests/test_details.py",
    *(MAPS + BACKWARD + OPTIMIZER + REFERENCE + CHECKPOINT + BASES + TRANSFORMS + GALORE),
    "tests/test_faults.py",
    "tests/test_resume.py",
    "tests/test_duality.py",
)


class Mutant(NamedTuple):
    """One change that must not go unnoticed.

    Args:
        file: The file, relative to the package.
        old: Text that is in it exactly once.
        new: What replaces it.
        breaks: What is wrong then.
        tests: The fewest tests that should notice, tried before `WIDE`.
    """

    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


MUTANTS = (
    # maps
    Mutant("maps.py", "return KroneckerMap(self.right, self.left)", "return self", "T of a map is the map", MAPS),
    Mutant("maps.py", "return TwoSidedMap(self.right.T, self.left.T)", "return self", "T of a joined map is the map", MAPS),
    Mutant(
        "maps.py",
        "part.lift(coords[block] if self.left is None else coords)",
        "part.lift((coords[block] if self.left is None else coords).to(weight.dtype))",
        "merge lifts in the weight's dtype",
        MAPS,
    ),
    Mutant("maps.py", "weight.index_add_(", "weight.index_copy_(", "merge of a selection overwrites the weight", MAPS),
    Mutant("maps.py", "b.to(coords.dtype)) ** power", "b.to(coords.dtype)) ** 1", "squares are carried as means", MAPS),
    Mutant(
        "maps.py",
        "coords = coords @ overlap(new.right, old.right).t()",
        "coords = coords @ overlap(new.right, old.right)",
        "a transpose is dropped in transport",
        MAPS,
    ),
    # gradient
    Mutant("gradient.py", "torch.promote_types(dtype, torch.float32)", "dtype", "norms and coordinates in bfloat16", MAPS),
    Mutant("gradient.py", ".sum().clamp_min(0).sqrt()", ".sum().sqrt()", "a vanishing norm is NaN", MAPS),
    Mutant("gradient.py", "if joined.smaller_than_dense:", "if True:", "factors pile up past the matrix's size", MAPS),
    Mutant(
        "gradient.py",
        "isinstance(part, FactoredGradient) and not part.smaller_than_dense:",
        "False:",
        "the first micro-batch stays factored whatever its size",
        MAPS,
    ),
    Mutant(
        "gradient.py",
        "matrix.addmm_(part.out_grad.t(), part.input)",
        "matrix.addmm_(part.out_grad.t(), part.input, beta=0)",
        "a micro-batch replaces those before it",
        MAPS,
    ),
    # captured
    Mutant(
        "captured.py",
        "self._staged if running == self._backward else None",
        "self._staged",
        "a backward that failed is counted",
        BACKWARD,
    ),
    Mutant(
        "captured.py",
        "self._anew = coords.grad is None or zeroed",
        "self._anew = coords.grad is None",
        "zeros by hand do not forget the refresh gradient",
        ZERO_GRAD,
    ),
    Mutant("captured.py", "None if self._anew else self.total", "self.total", "a forgotten gradient lives", ZERO_GRAD),
    Mutant("captured.py", "coords.grad.clone()", "coords.grad", "a factor from outside is not seen", CLIPPING),
    Mutant("captured.py", "return math.nan", "return 1.0", "a clip that made NaN is overlooked", CLIPPING),
    Mutant(
        "captured.py",
        "if not torch.allclose(now, factor * left, rtol=rounding, atol=floor):",
        "if False:",
        "a change by more than a factor is taken for one",
        CLIPPING,
    ),
    Mutant("captured.py", "elif left is None and not now.any():", "elif False:", "zeros set by others are refused", CHECKPOINT),
    Mutant(
        "captured.py",
        "if not left.any() or not left.isfinite().all():",
        "if not left.any():",
        "a factor is read from NaN",
        UNUSUAL,
    ),
    # subspace
    Mutant(
        "subspace.py",
        "dtype=wide(weight.dtype))",
        "dtype=weight.dtype)",
        "coordinates of bfloat16 weights in bfloat16",
        MAPS,
    ),
    Mutant("subspace.py", "own = derive_seed(seed, name)", "own = derive_seed(seed)", "all weights draw alike", STRUCTURE),
    Mutant("subspace.py", "refreshes, None\n", "refreshes, self._map\n", "the old map outlives its state", RESUMES),
    Mutant(
        "subspace.py",
        "(self.refreshes == 0 and self.transform.due(0))",
        "False",
        "a weight without a gradient at step 0 is never refreshed",
        UNUSUAL,
    ),
    Mutant(
        "subspace.py", "self.transform.due(step) or", "self.transform.due(step + 1) or", "refreshes a step early", REFERENCE
    ),
    Mutant("subspace.py", "        self.forget()\n        now =", "        now =", "a gradient survives its step", ZERO_GRAD),
    Mutant(
        "subspace.py",
        "if self.proposal is not None and self.coords.grad is not None:",
        "if False:",
        "a backward after the clip is accepted",
        CLIPPING,
    ),
    Mutant("subspace.py", "grad.norm())) * factor", "grad.norm()))", "a factor that is NaN refreshes", CLIPPING),
    Mutant("subspace.py", "if norm == 0.0 or not", "if not", "a zero gradient decides a basis", UNUSUAL),
    Mutant(
        "subspace.py",
        "projected = proposal.map.project",
        "projected = sub.map().project",
        "a refresh projects with the old map",
        HAND,
    ),
    Mutant(
        "subspace.py",
        "projected if factor == 1.0 else projected * factor",
        "projected",
        "a refresh forgets the factor from outside",
        CLIPPING,
    ),
    Mutant(
        "subspace.py",
        "    merge(sub, weight)\n    if moments",
        "    sub.coords.zero_()\n    if moments",
        "no merge at a refresh",
        REFERENCE,
    ),
    Mutant("subspace.py", "sub.refreshes + 1)", "max(sub.refreshes, 1))", "refreshes are not counted", BACKWARD),
    Mutant("subspace.py", "        moments.state.clear()\n", "", "reset keeps old moments", REFERENCE),
    Mutant(
        "subspace.py",
        "        moments.state.update(moments.initial())\n",
        "",
        "reset leaves adagrad without a state",
        OPTIMIZER,
    ),
    Mutant("subspace.py", "    sub.coords.mul_(factor)\n", "", "coordinates do not decay", REFERENCE),
    Mutant("subspace.py", "    weight.mul_(factor)\n", "", "the weight does not decay", HAND),
    Mutant("subspace.py", "    sub.coords.zero_()\n\n\ndef lifted", "\n\ndef lifted", "coordinates are merged twice", HAND),
    Mutant(
        "subspace.py",
        "if matrix.untyped_storage()._cdata == weight.untyped_storage()._cdata:",
        "if True:",
        "a merge into a copy of the weight is lost",
        BACKWARD,
    ),
    Mutant("subspace.py", "When(step, sub.refreshes", "When(0, sub.refreshes", "every draw is the first", BACKWARD),
    Mutant("moments.py", "if self.degrees[key] == 1 else", "if True else", "squares rotate as means", REFERENCE),
    Mutant(
        "subspace.py",
        "chosen if sub.transform.stores_map else None",
        "chosen",
        "a map that is made again is kept too",
        TRANSFORMS,
    ),
    Mutant(
        "subspace.py",
        "    if sub.released:\n        return\n    matrix",
        "    matrix",
        "coordinates that hold no memory are merged",
        ("tests/test_layerwise.py",),
    ),
    # layerwise
    Mutant(
        "layerwise.py",
        "        self._stepped.add(id(param))\n",
        "",
        "a second backward steps again",
        ("tests/test_layerwise.py",),
    ),
    Mutant(
        "layerwise.py",
        "        if not wait:\n",
        "        if True:\n",
        "a weight is merged before its layer has used it",
        ("tests/test_layerwise.py",),
    ),
    Mutant("optimizer.py", "        param.grad = None\n", "", "a stepped gradient stays", ("tests/test_layerwise.py",)),
    # optimizer
    Mutant(
        "optimizer.py", "self._arithmetic, self._step + 1)", "self._arithmetic, self._step + 2)", "eps of the next step", GALORE
    ),
    Mutant(
        "optimizer.py",
        "                pull(own, group)\n",
        "                pass\n",
        "what a base keeps in its group is lost",
        BASES,
    ),
    Mutant(
        "optimizer.py",
        "with torch.no_grad():\n            self._choose(self.attachments)",
        "pass",
        "a clip reads the old basis's gradient",
        CLIPPING,
    ),
    Mutant(
        "optimizer.py",
        "s.due and s.proposal is None and s.coords.grad is not None",
        "s.due and s.proposal is None",
        "a gradient that model.zero_grad() dropped is used",
        ZERO_GRAD,
    ),
    Mutant(
        "optimizer.py",
        "if factor is not None), 1.0)",
        "if factor is None), 1.0)",
        "no factor for a weight that got zeros",
        CLIPPING,
    ),
    Mutant("optimizer.py", "or param.grad is None:", "or False:", "a weight without a gradient decays", UNUSUAL),
    Mutant(
        "optimizer.py",
        'group["lr"] * group["weight_decay"]\n',
        'group["lr"] * group.get("scale", 1.0) * group["weight_decay"]\n',
        "scale in the decay",
        HAND,
    ),
    Mutant("persistence.py", "                self._step = found.step\n", "", "a resumed run counts from 0", RESUMES),
    Mutant(
        "persistence.py",
        "            sub.schedule(self._step)  # a redraw",
        "            sub.forget()  # a redraw",
        "a resumed run forgets what is due",
        RESUMES,
    ),
    Mutant(
        "optimizer.py",
        "            self._attach(before)\n            raise",
        "            raise",
        "a switch that fails leaves the model detached",
        BACKWARD,
    ),
    Mutant(
        "optimizer.py",
        "            merge(attachment.sub, attachment.weight)\n            attachment",
        "            attachment",
        "detach forgets coordinates",
        REFERENCE,
    ),
    Mutant(
        "optimizer.py",
        "            attachment.sub.forget()\n",
        "            pass\n",
        "zero_grad keeps a chosen basis",
        ZERO_GRAD,
    ),
    Mutant("optimizer.py", "probe = self._is_probe()", "probe = False", "the step that allocates state refreshes", CHECKPOINT),
    # adapters
    Mutant(
        "adapters/linear.py",
        "        if self.weight.requires_grad:\n",
        "        if False:\n",
        "an unfrozen weight stays so",
        BACKWARD,
    ),
    Mutant("adapters/linear.py", "self._tie, prepend=True,", "self._tie,", "other hooks run first", BACKWARD),
    Mutant(
        "adapters/linear.py",
        "current.T.apply(out_grad, coords.t())",
        "None and out_grad",
        "no gradient through S z to the input",
        BACKWARD,
    ),
    Mutant(
        "adapters/linear.py", "ctx.borrowed = x.is_leaf", "ctx.borrowed = False", "a borrowed input is not copied", BACKWARD
    ),
    Mutant("adapters/linear.py", "x = x.to(out.dtype)", "x = x", "autocast: the input keeps its dtype", BACKWARD),
    Mutant("adapters/linear.py", "else out.detach()", "else out", "in-place layers meet a view", BACKWARD),
    Mutant(
        "adapters/linear.py",
        "if sub.refreshes != ctx.refreshes:",
        "if False:",
        "an old forward projects by the new basis",
        BACKWARD,
    ),
    Mutant("adapters/weight.py", "        weight.grad = None\n", "", "a hook leaves the full gradient", BACKWARD),
    Mutant("adapters/weight.py", "matrix.dense().clone()", "matrix.dense()", "autograd's buffer is written into", BACKWARD),
    Mutant(
        "adapters/weight.py",
        "        self.weight.requires_grad_(self.sub.coords.requires_grad)\n",
        "",
        "detach leaves a weight frozen",
        STRUCTURE,
    ),
    Mutant(
        "adapters/base.py",
        "dtype=wide(asked.dtype)",
        "dtype=asked.dtype",
        "model.bfloat16() rounds coordinates",
        OPTIMIZER + CHECKPOINT,
    ),
    Mutant("adapters/base.py", "        self.sub.move(asked.device)\n", "", "a basis stays behind on its device", OPTIMIZER),
    # checkpoint
    Mutant(
        "checkpoint.py",
        "        trees.checked(like, moments, key, name)\n",
        "        pass\n",
        "moments of another shape are loaded",
        CHECKPOINT,
    ),
    Mutant(
        "checkpoint.py", "trees.copied(value, places.get(key, device))", "value", "a run writes into what it loaded", CHECKPOINT
    ),
    Mutant("checkpoint.py", '("param_names", "specs")', '("param_names",)', "another spec is loaded", CHECKPOINT),
    Mutant("checkpoint.py", 'refreshes": sub.refreshes', 'refreshes": 0', "refreshes are not saved", RESUMES),
    # parallel
    Mutant("parallel.py", "(tensor / count)", "(tensor)", "a sum over ranks instead of a mean", PARALLEL),
    Mutant(
        "parallel.py",
        "average(self.local.product(left, right))",
        "self.local.product(left, right)",
        "each rank its own products",
        PARALLEL,
    ),
    Mutant(
        "captured.py",
        "average(torch.zeros_like(now) if left is None else left)",
        "torch.zeros_like(now) if left is None else left",
        "each rank its own factor",
        PARALLEL,
    ),
    Mutant(
        "adapters/weight.py",
        "None, average(sub.map().project(matrix).to(sub.coords.dtype)), None",
        "None, sub.map().project(matrix).to(sub.coords.dtype), None",
        "a parametrized weight is not averaged",
        PARALLEL,
    ),
)


def copy_tracked(folder: Path) -> None:
    """Copy what git tracks, as it is in the working tree, and this program's own tests."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S607
    for name in [*filter(None, listed.split("\0")), *REFERENCE, "tests/reference.py"]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run Python in the copy; the exit status, or -1 when it took too long, and what it said."""
    # no bytecode: two mutants of one size, written within a second, would pass for each other
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return -1, ""
    return done.returncode, done.stdout + done.stderr


def killer(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first of the tests that fails; None when all pass."""
    present = [test for test in tests if (folder / test.partition("::")[0]).is_file()]
    if not present:
        return None
    options = ("-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider")
    # it starts three processes to show what other tests show in one
    skipped = "--deselect=tests/test_checkpoint.py::test_a_saved_model_goes_on_in_another_process"
    status, said = run(folder, "-m", "pytest", *options, skipped, *present)
    if status == 0:
        return None
    if status > 2:  # not 1, a failure, nor 2, a package that cannot be imported
        sys.exit(f"pytest did not run {' '.join(present)}: {said.strip()[-300:]}")
    if status == -1:
        return f"the time limit of {SECONDS} s"
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?|\S+)(?: - .*)?$", said, flags=re.MULTILINE)
    return found[1].removeprefix("tests/") if found else "a package that cannot be imported"


def main() -> None:
    """Try every mutant, print the table, and exit with 1 when one no longer applies or the tests fail without any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="", help="mutants whose file or description match this regex")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if re.search(options.only, f"{mutant.file}: {mutant.breaks}")]
    stale = [m for m in chosen if (ROOT / "lingrad" / m.file).read_text().count(m.old) != 1]
    for mutant in stale:
        print(f"{mutant.file}: no longer applies, its text is not there exactly once: {mutant.old!r}")
    if options.list:
        print("\n".join(f"{mutant.file}: {mutant.breaks}" for mutant in chosen))
        sys.exit(bool(stale))
    begin = time.monotonic()
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tracked(folder)
        where = run(folder, "-c", "import lingrad; print(lingrad.__file__)")[1].strip()
        print(f"mutating {where}", flush=True)
        if not Path(where).is_relative_to(folder):
            sys.exit("the installed package would be tested, not its copy")
        failing = killer(folder, WIDE)
        if failing is not None:
            sys.exit(f"without a mutant the tests fail already: {failing}")
        for mutant in chosen:
            if mutant in stale:
                continue
            path = folder / "lingrad" / mutant.file
            whole = path.read_text()
            path.write_text(whole.replace(mutant.old, mutant.new))
            by = killer(folder, mutant.tests) or killer(folder, WIDE)
            path.write_text(whole)
            survivors += by is None
            print(f"{mutant.file:20}  {mutant.breaks:58}  {by or 'SURVIVED'}", flush=True)
    tried = len(chosen) - len(stale)
    print(
        f"{tried} mutants, {tried - survivors} killed, {survivors} survived, {len(stale)} no longer apply; "
        f"{time.monotonic() - begin:.0f} s"
    )
    sys.exit(bool(stale))


if __name__ == "__main__":
    main()
