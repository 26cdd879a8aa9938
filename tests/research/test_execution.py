"""Runs of plans: what is recorded of them, of those that fail, and of those that were killed and started again."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lingrad.errors import DataError, SpecError
from lingrad.research import commands, execution, trial
from lingrad.research.execution import PLAN, execute
from lingrad.research.pages import as_html, as_markdown, write_report
from lingrad.research.plan import open_plan
from lingrad.research.record import RESULT, make_record
from lingrad.research.results import read_results, summarize
from lingrad.research.search import open_storage

pytest.importorskip("optuna", reason="make test installs it (extra: research)")
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_study"

TASK = """
import os, signal
from dataclasses import dataclass
import torch
from torch import nn
from lingrad.research import Task

@dataclass(frozen=True)
class Line(Task):
    trouble: str = ""

    def build(self, seed, dtype):
        torch.manual_seed(seed)
        if self.cache_folder is not None:
            self.cache_folder.mkdir(exist_ok=True)
            (self.cache_folder / str(seed)).touch()
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)

    def batches(self, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield torch.randn(8, 6, generator=generator)

    def loss(self, model, batch):
        if model[0].weight.requires_grad and self.trouble == "memory":
            raise MemoryError("out of memory")
        if self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        batch = batch.to(next(model.parameters()).dtype)
        return (model(batch) - batch[:, :4]).square().mean()

    def judge(self, model, part):
        return {"loss": float(self.loss(model, torch.ones(2, 6)))}
"""
PLAN_TEXT = """
name = "line"
seeds = {seeds}
[task]
kind = "line.py:Line"
steps = 4
trouble = "{trouble}"
[search]
sampler = "{sampler}"
trials = {trials}
space = {{lr = {lr}}}
[[entries]]
name = "svd"
method = "svd(rank=2, every=2)"
[[entries]]
name = "random map!"
method = "random(rank=2, every=2)"
mode = "adapter"
"""


def written(folder, *, trouble="", lr="[0.01, 0.1]", sampler="grid", trials=2, seeds="[1, 2]", more=""):
    folder.mkdir(exist_ok=True)
    (folder / "line.py").write_text(TASK)
    path = folder / "plan.toml"
    path.write_text(PLAN_TEXT.format(trouble=trouble, lr=lr, sampler=sampler, trials=trials, seeds=seeds) + more)
    return path


def job(path, **changes):
    plan = open_plan(path)
    of_plan = {"content": dict(plan.content), "where": PLAN, "folder": str(plan.folder), "quick": False, "entry": "svd"}
    of_run = {"values": {"lr": 0.01}, "seed": 3, "part": "final", "steps": None, "threads": 1}
    return {**of_plan, **of_run, **changes}


class TestOneRun:
    def test_its_record_runs_it_again(self, tmp_path):
        record = trial.run_job(job(written(tmp_path / "plan")), tmp_path / "first")
        kept = tmp_path / "first" / RESULT
        assert json.loads(kept.read_text()) == record
        assert {*record} == {"run_info", "train_info", "meta_info"}  # as PEFT's method_comparison has them
        info = record["train_info"]
        assert info["status"] == "success"
        assert info["steps"] == 4
        # two weights of 5 x 6 and 4 x 5 by rank 2 on their shorter sides, with Adam's moments; biases in full
        coords, basis, rest = 2 * 6 + 2 * 5, 2 * 5 + 2 * 4, 5 + 4
        assert info["state_bytes"] == 4 * (2 * coords + basis + 2 * rest) + 4 * len(["step"]) * 4
        lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert ["energy" in line for line in lines] == [True, False, True, False]
        assert trial.main(str(kept), str(tmp_path / "second")) == 0
        again = json.loads((tmp_path / "second" / RESULT).read_text())
        assert again["train_info"]["metrics"] == info["metrics"]

    @pytest.mark.parametrize(
        ("trouble", "values", "status", "message"),
        [
            ("", {"lr": 1e30}, "diverged", "the loss of step"),
            ("memory", {"lr": 0.1}, "out of memory", "out of memory"),
            ("", {"lr": 0.1, "rank": 9}, "error", "rank 9 is larger than"),
        ],
    )
    def test_a_failure_is_a_record(self, tmp_path, trouble, values, status, message):
        record = trial.run_job(job(written(tmp_path / "plan", trouble=trouble), values=values), tmp_path / "out")
        assert record["train_info"]["status"] == status
        assert message in record["run_info"]["error_msg"]
        assert not record["train_info"]["metrics"]

    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(trial, "train", full)
        path = tmp_path / "job.json"
        path.write_text(json.dumps(job(written(tmp_path / "plan"))))
        assert trial.main(str(path), str(tmp_path / "out")) == 28
        assert not (tmp_path / "out").exists()

    def test_both_modes_judge_alike(self, tmp_path):
        plan = written(
            tmp_path / "plan", more='[[entries]]\nname = "twin"\nmethod = "svd(rank=2, every=2)"\nmode = "adapter"\n'
        )
        plan.write_text(plan.read_text() + '[run]\ndtype = "float64"\n')
        found = [
            trial.run_job(job(plan, entry=name), tmp_path / name)["train_info"]["metrics"]["loss"] for name in ("svd", "twin")
        ]
        assert found[0] == pytest.approx(found[1], abs=1e-12)

    def test_of_fewer_batches_than_steps_there_is_no_result(self, tmp_path):
        path = written(tmp_path / "plan")
        record = trial.run_job(job(path, steps=3), tmp_path / "three")
        assert record["train_info"]["steps"] == 3
        task = path.parent / "line.py"
        task.write_text(task.read_text().replace("range(steps)", "range(9)"))  # more are not taken
        assert trial.run_job(job(path), tmp_path / "nine")["train_info"]["steps"] == 4

    def test_what_is_no_job(self, tmp_path, capsys):
        (tmp_path / "job.json").write_text("{}")
        assert trial.main(str(tmp_path / "job.json"), str(tmp_path / "out")) == 2
        assert "is neither a job nor the record of a run" in capsys.readouterr().err


def outcome(out):
    """What was made: status, metrics and values of each run, without times."""
    found = {}
    for path in sorted(out.glob(f"runs/*/*/{RESULT}")):
        record = json.loads(path.read_text())
        info = record["train_info"]
        found[str(path.parent.relative_to(out))] = info["status"], info["metrics"], record["run_info"]["job"]["values"]
    return found


def test_failures_do_not_stop_the_rest(tmp_path):
    more = '[[entries]]\nname = "diverges"\nmethod = "svd(rank=2)"\noptions = {base = "sgd", lr = 1e30}\n'
    path = written(tmp_path / "plan", lr="[0.01]", trials=1, seeds="[1]", more=more)
    told = []
    execute(open_plan(path), tmp_path / "out", jobs=2, tick=lambda *state: told.append(state))
    assert [status for status, *_ in outcome(tmp_path / "out").values()].count("diverged") == 1
    assert {path.name for path in (tmp_path / "out/cache").iterdir()} == {"0", "1"}  # one for all runs: a seed each
    assert told[-1][:2] == (5, 6)  # no final run of what diverged
    assert re.fullmatch(r"best loss so far \S+ \((svd|random map!)\), about \d+ s left", told[-1][2])
    plan, runs = read_results([tmp_path / "out"])
    text = as_markdown(plan, summarize(plan, runs))
    assert re.search(r"\| diverges *\| *failed", text)
    assert "diverges, trial {}: diverged: DivergedError: the loss of step 2" in text
    files = write_report(plan, runs, tmp_path / "out", x="seconds", y="loss")
    pictures = {"curves.png", "sensitivity.png", "pareto.png", "diagnostics.png"}
    assert {file.name for file in files} == {"report.md", "report.json", "report.html", *pictures}
    entries = json.loads((tmp_path / "out/report.json").read_text())["entries"]
    assert [entry["name"] for entry in entries if entry["failures"]] == ["diverges"]
    with pytest.raises(SpecError, match="no run logs 'perplexity'. Logged: .*, loss$"):
        write_report(plan, runs, tmp_path / "out", y="perplexity")
    before = outcome(tmp_path / "out")
    commands.run(path, tmp_path / "out")  # nothing is left to do
    assert outcome(tmp_path / "out") == before
    path.write_text(path.read_text().replace("steps = 4", "steps = 5"))
    with pytest.raises(DataError, match="or of this one before its options, code or data were changed"):
        execute(open_plan(path), tmp_path / "out")


@pytest.mark.slow
def test_a_run_that_is_killed_is_a_failure(tmp_path):
    path = written(tmp_path / "plan", trouble="killed", lr="[0.01]", trials=1, seeds="[1]")
    execute(open_plan(path), tmp_path / "out", jobs=2)
    assert {status for status, *_ in outcome(tmp_path / "out").values()} == {"killed"}
    record = json.loads(next((tmp_path / "out").glob(f"runs/*/*/{RESULT}")).read_text())
    assert record["run_info"]["error_msg"] == "killed by signal 9, perhaps because the machine's memory was full"


def start(path, out, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lingrad", "run", str(path), "--out", str(out), *more]
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def trials_of(out, url=None):
    """Optuna's trials that have ended: number, what was tried, value."""
    import optuna

    storage = open_storage(out, url)
    names = optuna.get_all_study_names(storage)
    studies = {name: optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False) for name in names}
    return {
        name: [(t.number, dict(t.params), t.value) for t in trials if t.state.is_finished()] for name, trials in studies.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["grid", pytest.param("tpe", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, sampler, kills):
    lr = "[0.01, 0.1]" if sampler == "grid" else "{low = 0.001, high = 1.0, log = true}"
    path = written(tmp_path / "plan", sampler=sampler, lr=lr)
    execute(open_plan(path), tmp_path / "whole", jobs=2)
    moments = random.Random(kills)  # noqa: S311 - moments, no secret
    for _ in range(kills):
        process = start(path, tmp_path / "out", "--jobs", "2")
        time.sleep(moments.uniform(1.0, 15.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(path, tmp_path / "out", "--jobs", "2")
    text = process.communicate(timeout=500)[0].decode()
    assert process.returncode == 0, text
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert trials_of(tmp_path / "out") == trials_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("database", ["journal", "sqlite"])
def test_two_machines_share_the_trials(tmp_path, database):
    path = written(tmp_path / "plan")
    execute(open_plan(path), tmp_path / "whole", jobs=2)
    url = None if database == "journal" else f"sqlite:///{tmp_path / 'trials.db'}"
    more = () if url is None else ("--storage", url)
    outs = [tmp_path / "one"] * 2 if url is None else [tmp_path / "one", tmp_path / "two"]
    processes = [start(path, out, *more) for out in outs]
    for process in processes:
        text = process.communicate(timeout=500)[0].decode()
        assert process.returncode == 0, text
    assert trials_of(tmp_path / "one", url) == trials_of(tmp_path / "whole")
    made = {**outcome(outs[0]), **outcome(outs[1])}
    assert made == outcome(tmp_path / "whole")
    assert len(read_results([*dict.fromkeys(outs)])[1]) == len(made)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed: apt-get install chromium")
def test_the_page_works_in_a_browser_without_a_network(tmp_path):
    path = written(tmp_path / "plan", lr="[0.01]", trials=1, seeds="[1]")
    execute(open_plan(path), tmp_path / "out", jobs=2)
    plan, runs = read_results([tmp_path / "out"])
    write_report(plan, runs, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", page)  # nothing is fetched
    watch = "<script>window.onerror = (m) => document.title = 'FAILED ' + m</script>"
    act = (
        "<script>const f = document.getElementById('filter'); f.value = 'SVD'; f.dispatchEvent(new Event('input'));"
        "document.querySelectorAll('th')[3].click();</script>"
    )
    (tmp_path / "page.html").write_text(page.replace("<head>", f"<head>{watch}").replace("</body>", f"{act}</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    shown = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<title>line</title>" in shown
    body = shown[shown.index("<tbody>") : shown.index("</tbody>")]
    assert body.count("<tr>") == 1  # the filter
    assert "svd(rank=2, every=2)" in body
    assert shown.count("<circle") >= 2
    assert shown.count("<polyline") >= 1


def test_a_schedule_rises_and_falls():
    from lingrad.research.training import rate

    assert [rate(step, 10, 0.2, "linear") for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    assert rate(9, 10, 0.0, "constant") == 1.0
    assert rate(0, 10, 0.0, "cosine") == 1.0
    assert rate(10, 10, 0.0, "cosine") == pytest.approx(0.1)


def test_saved_activations_are_counted_once():
    from lingrad.research.training import _counted

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh())
    with _counted(model) as found:
        model(torch.randn(8, 6, requires_grad=True)).sum()
    assert found[0] == 4 * (8 * 6 + 8 * 5)  # the input, and what tanh gave


@pytest.mark.slow
def test_the_example_of_ones_own_has_its_rows_and_curves(tmp_path):
    """examples/own_study: a transform in both modes, on a task of its own, beside a baseline."""
    files = commands.run(EXAMPLE / "plan.toml", tmp_path / "out", jobs=2, quick=True)
    plan, runs = read_results([tmp_path / "out"])
    found = {one.entry.name: one for one in summarize(plan, runs)}
    assert all(one.metrics["accuracy"].count == 1 and one.metrics["state MB"].value > 0 for one in found.values())
    assert all(len(run.curve) == plan.steps for run in runs)
    modes = [found[f"heaviest columns, {mode} mode"].metrics for mode in ("adapter", "optimizer")]
    assert modes[0]["accuracy"] == modes[1]["accuracy"]
    assert "| heaviest columns, adapter mode" in files[0].read_text()


def test_the_commands_say_what_is_wrong(lingrad, tmp_path):
    path = written(tmp_path / "plan", sampler="gird")
    code, _, error = lingrad("run", path, "--out", tmp_path / "out")
    assert (code, error) == (2, "lingrad: sampler must be one of grid, random, tpe, not 'gird'; did you mean 'grid'?\n")
    assert not (tmp_path / "out").exists()
    empty = tmp_path / "no results"
    empty.mkdir()
    code, _, error = lingrad("report", empty)
    assert code == 2
    assert error.startswith(f"lingrad: {empty} holds no results of a plan: there is no plan.json.")
    assert f"`lingrad run PLAN.toml --out '{empty}'` makes some" in error


def results(folder, *losses, values=None, **metrics):
    """A folder of final runs of the first entry, and one of the other."""
    path = written(folder / "plan", seeds="[1, 2, 3]", trials=2, sampler="random", lr="{low = 0.001, high = 1.0}")
    out = folder / "out"
    plan = open_plan(path)
    kept = {"digest": plan.digest, "content": dict(plan.content), "folder": str(path.parent), "quick": False}
    out.mkdir()
    (out / PLAN).write_text(json.dumps(kept))
    for number, loss in enumerate(losses):
        for part, name in (("tuning", f"search-{number:03d}"), ("final", f"final-{number:03d}")):
            run = job(path, part=part, seed=number + 1, values={"lr": (values or losses)[number]})
            found = {"metrics": {"loss": loss, **metrics}, "seconds": 1.0, "tokens": 8, "steps": 4}
            record = make_record(run, found, status="success", error="", created="")
            (out / "runs" / "svd" / name).mkdir(parents=True)
            (out / "runs" / "svd" / name / RESULT).write_text(json.dumps(record))
    return out


def test_a_run_counts_once(tmp_path):
    out = results(tmp_path, 1.0, 2.0)
    shutil.copytree(out, tmp_path / "other")
    plan, runs = read_results([out, tmp_path / "other"])
    (one, _) = summarize(plan, runs)
    assert one.metrics["loss"].count == 2
    assert one.missing == 1
    assert "Runs without a record here: svd (1), random map! (2)." in as_markdown(plan, summarize(plan, runs))


def test_diagnostics_are_in_the_report(tmp_path):
    out = results(tmp_path, 1.0, 2.0)
    of_step = {"loss": 1.0, "lr": 0.1, "seconds": 1.0, "tokens": 8}
    for number, overlaps in enumerate([(0.5, 0.7), (0.4, 0.6)]):
        lines = [{"step": step, **of_step, "overlap": value} for step, value in enumerate(overlaps, 1)]
        lines += [{"step": 3, **of_step, "gap": None}, {"step": 4, **of_step}]
        folder = out / "runs" / "svd" / f"final-{number:03d}"
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan, runs = read_results([out])
    text = as_markdown(plan, summarize(plan, runs))
    assert re.search(r"\| entry +\| +overlap \|", text)  # and no gap: it was never finite
    assert re.search(r"\| svd +\| 0\.65 \(0\.55\) \|", text)  # the last of each run, and the mean of each, by hand
    assert len(re.findall(r"\| random map! +\|", text)) == 1  # nothing was measured of it
    page = as_html(plan, summarize(plan, runs))
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["diagnostics"] == ["overlap"]
    assert data["entries"][0]["diagnostics"] == {"overlap": [[[1, 0.5], [2, 0.7]], [[1, 0.4], [2, 0.6]]]}
    assert data["entries"][1]["diagnostics"] == {}


def test_the_edge_of_a_range_is_what_was_tried(tmp_path):
    plan, runs = read_results([results(tmp_path, 1.0, 2.0, values=[0.2, 0.1])])
    assert summarize(plan, runs)[0].at_edge == ["lr"]


def test_a_metric_that_is_not_finite(tmp_path):
    out = results(tmp_path, 1.0, 2.0, perplexity=float("inf"))
    assert all("Infinity" not in path.read_text() for path in out.rglob(RESULT))  # which is no JSON
    plan, runs = read_results([out])
    assert math.isnan(summarize(plan, runs)[0].metrics["perplexity"].value)
    assert write_report(plan, runs, out, y="perplexity")


def test_files_that_were_moved_are_named(tmp_path):
    out = results(tmp_path, 1.0)
    shutil.move(tmp_path / "plan", tmp_path / "moved")
    with pytest.raises(SpecError, match="there is no file .*plan.line.py"):
        read_results([out])
    assert read_results([out], tmp_path / "moved")[1]


@pytest.mark.slow
def test_a_record_that_was_removed_is_made_again(tmp_path):
    path = written(tmp_path / "plan", lr="[0.01]", trials=1, seeds="[1]")
    execute(open_plan(path), tmp_path / "out", jobs=2)
    before = outcome(tmp_path / "out")
    for folder in (tmp_path / "out").glob("runs/svd-*/*"):
        shutil.rmtree(folder)
    execute(open_plan(path), tmp_path / "out", jobs=2)
    assert outcome(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob("runs/*/.*"))


@pytest.mark.slow
def test_what_is_matched(tmp_path):
    """Bytes: by hand, coordinates' moments and the basis take 20 + 36 numbers of rank 1; time: as many steps as take it."""
    entry = '[[entries]]\nname = "wide"\nmethod = "svd(rank=1, every=2, clip=true)"\n[match]\nequal = "{}"\nentry = "svd"\n'
    for equal in ("state_bytes", "seconds"):
        path = written(tmp_path / equal, lr="[0.01]", trials=1, seeds="[1]", more=entry.format(equal))
        execute(open_plan(path), tmp_path / equal / "out", jobs=2)
        plan, runs = read_results([tmp_path / equal / "out"])
        final = {run.entry: run for run in runs if run.final}
        if equal == "state_bytes":
            assert final["wide"].values["rank"] == 2
            assert final["wide"].info["state_bytes"] == final["svd"].info["state_bytes"]
        told = (
            "have no more bytes of state than svd's"
            if equal == "state_bytes"
            else "take as many steps as fit into the time of svd's"
        )
        assert f"Final runs {told}" in as_markdown(plan, summarize(plan, runs))


@pytest.mark.slow
def test_where_every_run_failed_the_command_says_so(tmp_path):
    path = written(tmp_path / "plan", trouble="memory", lr="[0.01]", trials=1, seeds="[1]")
    with pytest.raises(DataError, match="every run failed, the first with: MemoryError: out of memory"):
        commands.run(path, tmp_path / "out", jobs=2)
    assert (tmp_path / "out" / "report.html").exists()


def test_a_full_disk_ends_it_and_the_trial_is_made_by_the_next_run(tmp_path, monkeypatch):
    path = written(tmp_path / "plan", lr="[0.01]", trials=1, seeds="[1]")

    def full(self, *_):
        self.returncode = errno.ENOSPC

    monkeypatch.setattr(execution.Host, "start", full)
    with pytest.raises(
        DataError, match="cannot write results to .*: No space left on device; what has ended is kept: run it again"
    ):
        execute(open_plan(path), tmp_path / "out")
    assert not any(trials_of(tmp_path / "out").values())


def test_a_damaged_record_is_named(tmp_path):
    out = results(tmp_path, 1.0)
    (out / "runs" / "svd" / "final-000" / RESULT).write_text('{"run_info": {}}')
    with pytest.raises(
        DataError, match=r"the record .*result.json is damaged \(KeyError: 'job'\); remove its folder and run the plan again"
    ):
        read_results([out])
