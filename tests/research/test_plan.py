"""Plans: what they may say, and what is said where they say something else."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

import lingrad
from lingrad.errors import DataError, DependencyError, LingradError, SpecError
from lingrad.research.axes import Axis, grid
from lingrad.research.plan import LARGEST, make_plan, open_plan
from lingrad.research.ways import check_entry, make_method, rank_of
from lingrad.testing import assert_dual

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_study"
STUDIES = Path(__file__).parents[2] / "docs" / "studies" / "plans"
ENTRY = {"name": "a", "method": "svd(rank=4)"}


def content(**changes):
    plan = {
        "name": "n",
        "task": {"kind": "text", "steps": 20, "hidden": 32, "layers": 1},
        "search": {"space": {"lr": [0.1, 0.2]}},
        "entries": [dict(ENTRY), {"name": "b", "baseline": "lora(rank=2)"}],
    }
    return {**plan, **changes}


def made(folder=Path(), quick=False, **changes):
    plan = make_plan(content(**changes), "plan.toml", folder, quick=quick)
    for entry in plan.entries:
        check_entry(entry, plan.folder)
    return plan


def test_what_a_plan_says():
    plan = made()
    assert (plan.trials, plan.seeds, plan.sampler, plan.steps) == (2, (1, 2, 3), "grid", 20)
    assert plan.entries[0].space == {"lr": Axis(values=(0.1, 0.2))}
    assert plan.digest == made().digest != made(name="m").digest
    quick = made(quick=True)
    assert (quick.trials, quick.seeds, quick.steps) == (1, (1,), 2)
    assert quick.digest != plan.digest
    again = make_plan(quick.content, "plan.json", quick.folder, quick=True)  # as a trial's process reads it
    assert again.digest == quick.digest


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"space": {"carry": ["keep", "wrong"]}}, "carry must be one of"),
        ({"space": {"rank": [4, "eight"]}}, "rank must be"),
        ({"space": {"rank": [4, 0]}}, "rank must be"),
        ({"space": {"lr": [0.1, -1.0]}}, "lr must be a number, 0 or more, not -1.0"),
        ({"space": {"lr": [0.1, "x"]}}, "lr must be a number, 0 or more, not 'x'"),
        ({"mode": "adapter", "options": {"residual": "scaled"}}, "residual"),
        ({"method": "gum(rank=2)", "mode": "adapter"}, "residual"),
        ({"method": "q_galore(rank=2)"}, "rounding='stochastic' is for weights in 16 or 8 bits"),
        ({"method": "", "baseline": "lora(rank=2)", "space": {"carry": ["keep"]}}, "base 'adamw' takes no option 'carry'"),
        ({"method": "", "baseline": "lora(rank=0)"}, "rank of baseline 'lora' must be a whole number, 1 or more, not 0"),
        ({"method": "", "baseline": "scale(rank=2)"}, "baseline 'scale' has no rank; leave it out"),
    ],
)
def test_every_value_is_tried_before_anything_trains(entry, message):
    with pytest.raises(SpecError) as caught:
        made(entries=[{**ENTRY, **entry}], search={"sampler": "random", "trials": 1, "space": {}})
    assert str(caught.value).startswith("entry 'a': ")
    assert message in str(caught.value)


def test_another_code_is_another_plan(tmp_path):
    text = (EXAMPLE / "parity.py").read_text()
    digests = set()
    for addition in ("", "# changed"):
        (tmp_path / "own.py").write_text(text + addition)
        digests.add(made(folder=tmp_path, task={"kind": "own.py:Parity", "steps": 2}).digest)
    assert len(digests) == 2


def test_the_plan_of_the_docs_is_one():
    text = (Path(__file__).parents[2] / "docs" / "research.md").read_text()
    plan = make_plan(tomllib.loads(text.split("```toml\n")[1].split("```")[0]), "research.md", Path())
    for entry in plan.entries:
        check_entry(entry, plan.folder)
    assert plan.trials == 4


def test_an_entry_adds_to_what_is_searched_or_settles_it():
    first = {**ENTRY, "space": {"rank": [2, 4]}, "options": {"lr": 0.5}}
    plan = made(entries=[first, {"name": "b", "baseline": "adamw"}])
    assert [list(entry.space) for entry in plan.entries] == [["rank"], ["lr"]]
    assert grid({"lr": Axis(values=(1, 2)), "rank": Axis(values=(3, 4))})[:2] == [{"lr": 1, "rank": 3}, {"lr": 1, "rank": 4}]


KRON = "kron(left=svd(rank=2), right=random(rank=2))"
SPACE = "plan.toml, [search], [space], lr"
WRONG = [
    (
        {"nam": "x"},
        "plan.toml: unknown key 'nam'; did you mean 'name'? Known: name, imports, task, search, run, match, seeds, entries",
    ),
    ({"name": 3}, "plan.toml: 'name' must be a text, not 3"),
    ({"run": {"diagnostics": [["gap"]]}}, "plan.toml, [run]: 'diagnostics' must be texts, not ['gap']"),
    (
        {"entries": [{"name": "a", "method": "svd(rank=4)", "diagnostics": [["gap"]]}]},
        "plan.toml, [[entries]] 1: 'diagnostics' must be texts, not ['gap']",
    ),
    (
        {"entries": [{"name": "a", "method": "svd(rank=4)", "diagnostics": ["gap", "gap"]}]},
        "plan.toml, entry 'a': 'diagnostics' names one of them twice; leave it out once",
    ),
    (
        {"entries": [{"name": "a", "method": "svd(rank=4)", "diagnostics": ["gap"]}], "run": {"processes": 2}},
        "plan.toml: the diagnostics gap are for runs of one process; leave them out, or 'processes'",
    ),
    (
        {"entries": [{"name": "a", "method": "svd(rank=4)", "dtype": "float23"}]},
        "dtype must be one of float32, float64, bfloat16, not 'float23'; did you mean 'float32'?",
    ),
    ({"entries": []}, "plan.toml: 'entries' is empty; give one [[entries]] at least"),
    (
        {"search": {"trails": 3}},
        "plan.toml, [search]: unknown key 'trails'; did you mean 'trials'? Known: space, sampler, pruner, rungs, seed, trials",
    ),
    (
        {"search": {"sampler": "gird", "trials": 1}},
        "sampler must be one of grid, random, tpe, not 'gird'; did you mean 'grid'?",
    ),
    ({"search": {"sampler": "tpe"}}, "plan.toml, [search]: 'trials' must be 1 or more: the trials of every entry"),
    (
        {"search": {"space": {"lr": 0.1}}},
        f"{SPACE} must be a list of values or a range such as {{low = 1e-4, high = 1e-1, log = true}}, not 0.1",
    ),
    (
        {"search": {"space": {"lr": {"low": 0, "high": 1, "log": True}}}},
        f"{SPACE}: low must be below high, and above 0 where log = true; not 0 and 1",
    ),
    (
        {"search": {"space": {"lr": {"low": 1e-3, "high": 1.0}}}},
        "a grid needs the values of 'lr' in a list, not a range; or take sampler = \"random\"",
    ),
    ({"seeds": [0, 1]}, "plan.toml: seed 0 is that of the search; judge by other seeds"),
    ({"seeds": [1, 1]}, "plan.toml: 'seeds' must be a list of different whole numbers, 0 or more and below 2^32"),
    ({"seeds": [10**30]}, "plan.toml: 'seeds' must be a list of different whole numbers, 0 or more and below 2^32"),
    ({"imports": [3]}, "plan.toml: 'imports' must be texts, not 3"),
    ({"run": {"device": "gpu"}}, "plan.toml, [run]: there is no device 'gpu' here: "),
    ({"match": {"equal": "seconds"}}, "plan.toml, [match]: 'entry' is missing: that which the others are matched with"),
    ({"search": {"space": {"lr": [float("nan")]}}}, f"{SPACE}: values must be texts, finite numbers, true or false, not [nan]"),
    ({"task": {"kind": "text"}}, "plan.toml, [task]: 'steps' is missing, a whole number; or 'tokens', a budget"),
    (
        {"task": {"kind": "text", "steps": 2, "tokens": 9}},
        "plan.toml, [task] has both 'steps' and 'tokens'; leave one of them out",
    ),
    ({"search": {"pruner": "hyperband"}}, "pruner must be one of none, median, halving, not 'hyperband'"),
    ({"search": {"rungs": 0}}, "plan.toml, [search]: 'rungs' must be from 1 to 10, not 0"),
    ({"run": {"processes": 0}}, "plan.toml, [run]: 'processes' must be 1 or more, not 0"),
    (
        {"run": {"processes": 2, "diagnostics": ["energy", "gap"]}},
        "plan.toml: the diagnostics gap are for runs of one process; leave them out, or 'processes'",
    ),
    ({"run": {"trackers": [3]}}, "plan.toml, [run]: 'trackers' must be texts, not 3"),
    ({"run": {"trackers": ["a", "a"]}}, "plan.toml, [run]: 'trackers' names one of them twice; leave it out once"),
    ({"task": {"kind": "text", "tokens": 0}}, "plan.toml, [task]: 'tokens' must be 1 or more, not 0"),
    ({"task": {"kind": "text", "stps": 9}}, "plan.toml, [task]: unknown key 'stps'; did you mean 'steps'?"),
    (
        {"task": {"kind": "txt", "steps": 2}},
        "plan.toml, [task]: there is no task 'txt'; did you mean 'text'? "
        "Known: text, classify, chat, metamathqa, FILE.py:CLASS",
    ),
    (
        {"task": {"kind": "text", "steps": 2, "row": 3}},
        "plan.toml, [task]: unknown key 'row'; did you mean 'rows'? "
        "Known: steps, tokens, kind, data, column, model, tokenizer, vocabulary, rows, length, hidden, layers, held",
    ),
    ({"task": {"kind": "text", "steps": 2, "rows": 0}}, "task 'text': 'rows' must be 1 or more, not 0"),
    ({"task": {"kind": "classify", "steps": 2}}, "plan.toml, [task]: 'data' is missing, a text"),
    ({"task": {"kind": "gone.py:Task", "steps": 2}}, f"there is no file {Path('gone.py').absolute()}"),
    ({"run": {"schedule": "cosin"}}, "schedule must be one of constant, linear, cosine, not 'cosin'; did you mean 'cosine'?"),
    ({"run": {"warmup": 1.0}}, "plan.toml, [run]: 'warmup' is a share of the steps, 0 or more and below 1"),
    ({"match": {"entry": "a"}}, "plan.toml, [match]: 'equal' is missing: state_bytes or seconds"),
    ({"match": {"equal": "seconds", "entry": "c"}}, "plan.toml, [match]: there is no entry 'c'."),
    (
        {"entries": [{"name": "a"}]},
        "entry 'a' needs either a method or a baseline: a config string such as \"galore(rank=32)\", or one of `lingrad "
        'methods` such as "lora(rank=16)"',
    ),
    ({"entries": [ENTRY, {**ENTRY, "name": "A"}]}, "plan.toml: two entries have one name"),
    (
        {"entries": [{**ENTRY, "mode": "adaptor"}]},
        "mode must be one of optimizer, adapter, not 'adaptor'; did you mean 'adapter'?",
    ),
    (
        {"entries": [{"name": "a", "baseline": "lora", "mode": "adapter"}]},
        "entry 'a': a baseline has no mode; leave it out",
    ),
    (
        {"entries": [ENTRY, {"name": "b", "method": "svd(rank=4)", "space": {"rank": [1, 2, 3]}}]},
        "entry 'a' has a grid of 2 points where the budget is 6 trials; every entry must have the same: give all grids one "
        'size, or take sampler = "random"',
    ),
    (
        {"entries": [{"name": "a", "method": "galor(rank=3)"}]},
        "entry 'a': unknown transform or method 'galor'; did you mean 'galore'?",
    ),
    (
        {"entries": [{"name": "a", "method": "svd(rnk=3)"}]},
        "entry 'a': unknown option 'rnk' of svd; did you mean 'rank'?\n",
    ),
    (
        {"entries": [{"name": "a", "method": "svd(rank=3)", "options": {"carri": "keep"}}]},
        "entry 'a': base 'adamw' takes no option 'carri'; did you mean 'carry'?",
    ),
    ({"entries": [{"name": "a", "baseline": "lorra(rank=3)"}]}, "entry 'a': unknown baseline 'lorra'; did you mean 'lora'?"),
    (
        {"entries": [{"name": "a", "baseline": "lora"}]},
        "entry 'a': baseline 'lora' needs rank, as in baseline('lora', rank=16)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said(changes, message):
    with pytest.raises(SpecError) as caught:
        made(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the plan {}: No such file or directory"),
        (b"a = ", "the plan {} is no TOML: "),
        (b"\xff", "the plan {} is not in UTF-8 (byte 0); convert it first"),
        (b"\xef\xbb\xbf", "the plan {} is empty"),
        (b"#" * (LARGEST + 1), "the plan {} is larger than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path, text, message):
    path = tmp_path / "plan.toml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(DataError) as caught:
        open_plan(path)
    assert str(caught.value).startswith(message.format(path))


def test_a_plan_may_begin_with_a_byte_order_mark(tmp_path):
    plain, marked = (tmp_path / name for name in ("plain.toml", "marked.toml"))
    text = Path("docs/studies/plans/maps.toml").read_text()
    plain.write_text(text)
    marked.write_text(text, encoding="utf-8-sig")
    assert open_plan(marked).content == open_plan(plain).content


@pytest.mark.parametrize(
    ("entry", "values", "rules", "options"),
    [
        ({"method": "svd(rank=4)"}, {"lr": 0.1, "rank": 8}, "svd(rank=8)", {"lr": 0.1}),
        ({"method": "galore(rank=4)"}, {"scale": 0.5, "every": 7}, "galore(rank=4, every=7)", {"scale": 0.5}),
        ({"method": "finetune"}, {"rank": 8}, "finetune(rank=8)", {}),
        ({"method": "galore(rank=4)", "options": {"carry": "rotate"}}, {}, "galore(rank=4)", {"carry": "rotate"}),
        ({"method": KRON}, {"lr": 1.0}, KRON, {"lr": 1.0}),
    ],
)  # fmt: skip
def test_values_of_a_trial_go_where_they_belong(entry, values, rules, options):
    plan = made(entries=[{"name": "a", **entry}])
    method = make_method(plan.entries[0], values, seed=5, folder=Path())
    assert (method.rules, dict(method.options)) == (rules, {"seed": 5, **options})
    assert rank_of(plan.entries[0], values) == values.get("rank", None if "kron" in rules else 4 if "rank=4" in rules else None)


@pytest.mark.parametrize("name", ["pca", "online_subspace_descent", "svd", "power", "galore", "finetune", "ldadam", "fira"])
def test_the_learning_rate_of_a_trial_is_that_of_the_run(name):
    """`pca` has an option of this name too."""
    plan = made(entries=[{"name": "a", "method": f"{name}(rank=4)"}])
    method = make_method(plan.entries[0], {"lr": 0.37}, seed=5, folder=Path())
    assert method.options["lr"] == 0.37
    assert "0.37" not in method.rules


class TestOwn:
    """The example of a transform and a task of one's own."""

    def test_it_is_a_plan(self):
        plan = open_plan(EXAMPLE / "plan.toml")
        for entry in plan.entries:
            check_entry(entry, plan.folder)
        assert type(plan.task).__name__ == "Parity"
        assert plan.trials == 3

    @pytest.mark.parametrize("base", ["adamw", "lion"])
    def test_its_transform_is_dual(self, base):
        open_plan(EXAMPLE / "plan.toml")
        assert assert_dual("heaviest(rank=2, every=2)", base, lr=1e-2) <= 1e-12

    def test_both_modes_train_alike(self):
        plan = open_plan(EXAMPLE / "plan.toml")
        weights = []
        for mode in (lingrad.wrap, lingrad.adapt):
            model = plan.task.build(1, torch.float64)
            optimizer = mode(model, "heaviest(rank=2, every=3)", lr=1e-2)
            for batch in plan.task.batches(8, 1):
                optimizer.zero_grad()
                plan.task.loss(model, batch).backward()
                optimizer.step()
            weights.append(optimizer.weights())
        assert all(torch.allclose(weights[0][name], weight, rtol=0, atol=1e-12) for name, weight in weights[1].items())

    @pytest.mark.parametrize(
        ("text", "kind", "message"),
        [
            ("raise KeyError('x')", "own.py:Own", "own.py fails: KeyError: 'x'"),
            ("class Owm: pass", "own.py:Own", "own.py has no 'Own'; did you mean 'Owm'?"),
            ("Own = 3", "own.py:Own", "'own.py:Own' is no task: it must be a dataclass derived from lingrad.research.Task"),
        ],
    )
    def test_a_file_that_holds_no_task(self, tmp_path, text, kind, message):
        (tmp_path / "own.py").write_text(text)
        with pytest.raises(LingradError) as caught:
            made(folder=tmp_path, task={"kind": kind, "steps": 2})
        assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_plans_of_the_studies_are_plans(path):
    plan = open_plan(path)
    for entry in plan.entries:
        with contextlib.suppress(DependencyError):  # of an extra that is not installed here
            check_entry(entry, plan.folder)
    assert f"docs/studies/plans/{path.name} --out runs/studies/{path.stem}" in path.read_text()


@pytest.mark.parametrize("baseline", ["apollo(rank=4)", "apollo_mini"])
def test_what_a_baseline_draws_differs_from_seed_to_seed(baseline):
    plan = made(entries=[{"name": "a", "baseline": baseline}])
    methods = [make_method(plan.entries[0], {}, seed=seed, folder=Path()) for seed in (1, 2)]
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in methods]
    found = [method.prepare(model).optimizers[0] for method, model in zip(methods, layers, strict=True)]
    assert [one.param_groups[0]["seed"] for one in found] == [1, 2]
