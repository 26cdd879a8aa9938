"""The engine on a GPU: the duality, the same run as on the CPU, checkpoints, moves, mixed precision, memory, no waiting.

Models are tiny and nothing here measures speed. Where there is no CUDA device every test is skipped, and says so.
"""

import contextlib
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import lingrad
from lingrad import optimizers
from lingrad.engine import offload
from lingrad.errors import DependencyError
from tests.support import cases
from tests.support.cases import Case
from tests.support.gpu import ACROSS, DEVICE, RUN, TOLERANCE, assert_lives_on, moved
from tests.support.gpu import pytestmark as pytestmark
from tests.support.gpu import same_arithmetic as same_arithmetic
from tests.support.models import gap, llama, text_batches, three_ways, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import EVERY_KIND, LINEAR, MODES, assert_equal_bits, assert_same, each_mode, through_a_file, weights_of


@pytest.fixture
def cases_on_gpu(monkeypatch):
    """`Case.run` with its models and its batches on the GPU."""
    monkeypatch.setattr(cases, "zoo", lambda dtype: zoo(dtype).to(DEVICE))
    monkeypatch.setattr(cases, "token_batches", lambda steps: moved(zoo_batches(steps)))


def find_base(name, options):
    try:
        return optimizers.find(name, options, decay=False)
    except DependencyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("base", ["adamw", torch.optim.RAdam])
def test_capturable_is_taken_and_changes_no_weight(base):
    batches = moved(text_batches(4))
    weights = []
    for options in ({}, {"capturable": True}):
        model = llama(torch.float32).to(DEVICE)
        optimizer = lingrad.wrap(model, "random(rank=4, every=2)", base, lr=1e-3, foreach=True, **options)
        train(model, optimizer, batches)
        assert all(group.get("capturable") is bool(options) for group in optimizer.param_groups)
        weights.append(optimizer.weights())
    assert gap(*weights) < 1e-5  # float32: bias corrections are computed on the GPU


class TestDuality:
    """Optimizer mode, adapter mode and a run that switches twice, with micro-batches, a schedule, decay and scale."""

    @staticmethod
    def transforms():
        """Every registered transform on every side with adamw; what else a case has is taken in turn."""
        options = {"lr": 1e-2, "eps": 1e-4}
        for i, text in enumerate(cases.variants()):
            carry = "reset" if "align=false" in text else cases.CARRIES[i % 3]
            sides = cases.SIDES if "{side}" in text else ("short",)
            for j, side in enumerate(sides):
                case = Case(rules=text, side=side, carry=carry, options=options, clip=cases.CLIPS[(i + j) % 2])
                yield pytest.param(case, id=case.label, marks=() if j == i % len(sides) else pytest.mark.slow)

    @pytest.mark.parametrize("case", list(transforms()))
    def test_every_transform(self, case, cases_on_gpu):
        case.run()

    @staticmethod
    def all_bases():
        for i, (base, options) in enumerate(base for base in cases.base_options() if base[0] != "adamw8bit"):
            case = Case(rules="svd(rank=4, every=7, side={side})", side=cases.SIDES[i % 5], base=base, options=options)
            yield pytest.param(case, id=case.label)

    @pytest.mark.parametrize("case", list(all_bases()))
    def test_every_base(self, case, cases_on_gpu):
        find_base(case.base, case.options)
        case.run()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("text", "side", "base"),
        [
            ("svd(rank=4, every=7, side={side})", "short", ("adamw", {"lr": 1e-2, "eps": 1e-4})),
            ("power(rank=4, every=7, side={side})", "long", ("sgd", {"lr": 1e-1, "momentum": 0.9})),
            ("random(rank=4, every=7, side={side}, kind=rows)", "both", ("adamw", {"lr": 1e-2, "eps": 1e-4})),
            (cases.UNSIDED[0], "short", ("adamw", {"lr": 1e-2, "eps": 1e-4})),
        ],
    )
    def test_low_precision(self, text, side, base, dtype, cases_on_gpu):
        """5e-5 in float32; 2e-2 in bfloat16, where a weight is rounded to 2^-8 at each merge."""
        Case(rules=text, side=side, base=base[0], options=base[1]).run(dtype)

    @pytest.mark.parametrize(
        "spec",
        [
            "svd(rank=4, every=5)",
            "random(rank=4, every=5, side=both)",
            "kron(left=power(rank=4, every=5), right=random(rank=3, every=4))",
        ],
    )
    def test_llama(self, spec):
        def build():
            return llama().to(DEVICE)

        start = {name: param.detach() for name, param in build().named_parameters()}
        batches = moved(text_batches(12))
        wrapped, adapted, switched = three_ways(build, spec, "adamw", batches, switches=(4, 8), **RUN)
        assert {weight.device.type for weight in wrapped.values()} == {DEVICE}
        assert gap(adapted, wrapped) <= TOLERANCE
        assert gap(switched, wrapped) <= TOLERANCE
        assert gap(wrapped, start) > 1e-3

    def test_8_bit_moments(self, cases_on_gpu):
        """In float32: bitsandbytes has no float64 on a GPU. Rounding that crosses an edge of 8 bits is 1 % of a step."""
        pytest.importorskip("bitsandbytes")
        options = {"lr": 1e-2, "min_8bit_size": 16}
        Case(rules="svd(rank=4, every=7, side={side})", base="adamw8bit", options=options).run(torch.float32)


class TestTheSameAsOnTheCPU:
    """Seeds mean the same on every device: a run on the GPU is the run on the CPU, to what rounding grows to."""

    @staticmethod
    def run(device, mode, spec, base="adamw", steps=8, **options):
        model = zoo().to(device)
        optimizer = MODES[mode](model, {"*": spec}, base, **{**RUN, **options})
        train(model, optimizer, moved(zoo_batches(steps), device), zoo_loss)
        assert_lives_on(optimizer, device)
        return weights_of(optimizer)

    @each_mode
    @pytest.mark.parametrize(
        "spec",
        [
            "random(rank=4, every=3)",
            "random(rank=4, every=3, kind=rademacher)",
            "random(rank=4, every=3, kind=orthonormal)",
            "random(rank=4, every=3, kind=rows, side=both)",
            "random(rank=4, every=3, store=false)",
            "svd(rank=4, every=3)",
            "svd(rank=4, every=3, solver=gram)",
            "svd(rank=4, every=3, solver=randomized)",
            "svd(rank=4, every=3, solver=randomized, oversample=1)",
            "pca(rank=4, side=left)",
            "power(rank=4, every=3, side=left)",
            "power(rank=4, every=3, side=right)",
        ],
    )
    def test_transforms(self, spec, mode):
        expected = self.run("cpu", mode, spec)
        assert gap(self.run(DEVICE, mode, spec), expected) <= ACROSS
        assert gap(expected, {name: param.detach() for name, param in zoo().named_parameters()}) > 1e-3

    @each_mode
    def test_a_seed_decides(self, mode):
        """The comparison above can fail: another seed gives another run."""
        spec = "random(rank=4, every=3)"
        assert gap(self.run(DEVICE, mode, spec, seed=1), self.run("cpu", mode, spec)) > 1e-3

    @each_mode
    def test_a_run_repeats_to_the_bit(self, mode):
        spec = "svd(rank=4, every=3)"
        assert_equal_bits(self.run(DEVICE, mode, spec), self.run(DEVICE, mode, spec))


class TestBases:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", [name for name in optimizers.names() if name != "adamw8bit"])
    def test_every_base_is_built_and_steps_on_the_gpu(self, name, dtype):
        """As on the CPU, to a few roundings of its dtype; muon orthogonalises in bfloat16, which sums in another order."""
        base = find_base(name, {"lr": 1e-2})
        places = []
        for device in ("cpu", DEVICE):
            generator = torch.Generator().manual_seed(0)
            param = nn.Parameter(torch.zeros(16, 12, dtype=dtype, device=device))
            optimizer = base.build([param])
            for _ in range(3):
                param.grad = torch.randn(16, 12, generator=generator, dtype=torch.float64).to(device, dtype)
                optimizer.step()
            for value in optimizer.state[param].values():
                assert not isinstance(value, torch.Tensor) or not value.dim() or value.device.type == device
            places.append(param.detach().cpu())
        allowed = 2e-2 if name == "muon" else 8 * torch.finfo(dtype).eps
        assert places[0].any()
        assert (places[1] - places[0]).double().norm() <= allowed * places[0].double().norm()

    @pytest.mark.parametrize("name", ["adamw", "adam"])
    def test_adam_is_fused(self, name):
        """Its step counter is on the device, so that a step waits for nothing."""
        param = nn.Parameter(torch.zeros(4, 4, device=DEVICE))
        optimizer = optimizers.find(name, {}).build([param])
        assert optimizer.param_groups[0]["fused"] is True
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.state[param]["step"].device.type == DEVICE
        assert not optimizers.find(name, {"fused": False}).build([param]).param_groups[0]["fused"]
        assert not optimizers.find(name, {"foreach": True}).build([param]).param_groups[0]["fused"]

    def test_muon_and_the_base_beside_it(self):
        model = llama(torch.float32).to(DEVICE)
        optimizer = lingrad.wrap(model, LINEAR, "muon", lr=1e-2)
        train(model, optimizer, moved(text_batches(4)))
        assert [type(stock) for stock in optimizer.bases()] == [torch.optim.Muon, torch.optim.AdamW]
        assert_lives_on(optimizer, DEVICE)


@contextlib.contextmanager
def nothing_waits():
    """Whatever makes the host wait for the device, such as ``bool(tensor)``, raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TestNothingWaits:
    """Off refresh steps the host runs ahead of the device. ``random(store=false)``, which copies its basis to the device at
    each use, is left out."""

    def test_the_watch_sees_a_wait(self):
        one = torch.ones(3, device=DEVICE)
        for wait in (lambda: bool(one.any()), lambda: float(one.sum()), lambda: torch.ones(3).to(DEVICE)):
            with nothing_waits(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                wait()

    @each_mode
    @pytest.mark.parametrize("clip", [None, 0.05])
    @pytest.mark.parametrize(
        "spec",
        [
            "svd(rank=4, every=4)",
            "svd(rank=4, every=4, side=both)",
            "power(rank=4, every=4)",
            "random(rank=4, every=4)",
            "random(rank=4, every=4, kind=rows)",
            "pca(rank=4, every=4)",
            "kron(left=svd(rank=4, every=4), right=random(rank=3, every=4, kind=rows))",
            "full()",
            "svd(rank=4, every=4, schedule=energy)",
            "power(rank=4, every=4, schedule=overlap)",
            "svd(rank=4, every=4, schedule=path(threshold=0.01))",
            "power(rank=4, every=4, schedule=path(threshold=1.0, measure=displacement))",
        ],
    )
    def test_off_refresh_steps(self, spec, clip, mode):
        model = zoo(torch.float32).to(DEVICE)
        optimizer = MODES[mode](model, {"*": spec}, lr=1e-2, weight_decay=0.1, scale=0.25)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        batches = moved(zoo_batches(7))
        torch.cuda.synchronize()
        for step, micro_batches in enumerate(batches):
            # the first step refreshes and the second finds kernels; 3 ends with the redraw for step 4, which refreshes
            with nothing_waits() if step in (2, 5, 6) else contextlib.nullcontext():
                optimizer.zero_grad()
                for batch in micro_batches:
                    (zoo_loss(model, batch) / len(micro_batches)).backward()
                if clip is not None:
                    optimizer.clip_grad_norm_(clip)
                optimizer.step()
                scheduler.step()
        if spec != "full()":
            assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}
        assert all(weight.isfinite().all() for weight in optimizer.weights().values())


@each_mode
def test_compiled_models_train_alike(mode):
    """Inductor's kernels round in other places than the eager ones, at 6e-8 a number; SGD does not magnify that much."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no C compiler, or no Python.h, which Triton needs: torch.compile has not been shown on a GPU")

    def build():
        torch.manual_seed(0)
        layers = (nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
        return nn.Sequential(*layers).to(DEVICE)

    def loss_of(model, x):
        return (model(x) - x.roll(1, dims=-1)).square().mean()

    generator = torch.Generator().manual_seed(1)
    batches = [[torch.randn(16, 32, generator=generator).to(DEVICE) for _ in range(2)] for _ in range(6)]
    start = {name: param.detach() for name, param in build().named_parameters()}
    found = []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = build()
        optimizer = MODES[mode](model, {"*.weight": "svd(rank=4, every=4)"}, "sgd", lr=0.5, momentum=0.5)
        assert len(optimizer.subspaces) == 3
        train(torch.compile(model) if compiled else model, optimizer, batches, loss_of, schedule=False)
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}
        found.append(optimizer.weights())
    assert gap(*found) <= 1e-4
    assert gap(found[0], start) > 1e-2


class TestNoFullGradient:
    """One 4096 x 4096 layer and 16 tokens: off refresh steps the device never holds one more matrix of the weight's size."""

    SIZE, TOKENS = 4096, 16

    def peak_of(self, model, optimizer, *, steps=4):
        """Bytes by which backward, and then step, rose above what was there before; of the last step."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.TOKENS, self.SIZE, generator=generator).to(DEVICE).requires_grad_()
        risen = []
        for _ in range(steps):  # the first refresh, then steps after which cuBLAS has its workspaces
            risen.clear()
            optimizer.zero_grad()
            loss = model(x).square().mean()
            for act in (loss.backward, optimizer.step):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                act()
                torch.cuda.synchronize()
                risen.append(torch.cuda.max_memory_allocated() - before)
        return risen

    def layer(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(self.SIZE, self.SIZE, device=DEVICE))

    @each_mode
    @pytest.mark.parametrize("side", ["left", "right", "both"])
    @pytest.mark.parametrize("text", ["svd(rank=8, solver=randomized, side={side})", "random(rank=8, side={side})"])
    def test_off_refresh_steps(self, text, side, mode):
        model = self.layer()
        weight = model[0].weight
        optimizer = MODES[mode](model, {"*.weight": text.format(side=side)}, lr=1e-3, weight_decay=0.1)
        backward, step = self.peak_of(model, optimizer)
        assert backward < weight.nbytes
        assert step < weight.nbytes
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {1}
        assert weight.grad is None

    def test_plain_training_holds_one(self):
        """The check above can fail."""
        model = self.layer()
        backward, _ = self.peak_of(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        assert backward >= model[0].weight.nbytes


class TestOffload:
    """Moments, bases and what was merged in pinned memory of the host, copied on streams of their own."""

    @staticmethod
    def trained(mode, words, options, loaded=None):
        """A run of seven steps, of four that are saved, or of the other three after these."""
        model = zoo(torch.float32).to(DEVICE)
        optimizer = MODES[mode](model, EVERY_KIND, "adamw", ledger=True, offload=words, **RUN, **options)
        if loaded is not None:
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
        batches = moved(zoo_batches(7, micro=1))
        train(model, optimizer, batches if loaded is None else batches[4:], zoo_loss, schedule=False)
        return model, optimizer

    @each_mode
    @pytest.mark.parametrize(
        "options",
        [
            {"carry": "rotate"},
            {"carry": "reset", "foreach": True},
            {"layerwise": True},
            {"moments": "8bit", "min_8bit_size": 16},
        ],
        ids=str,
    )
    def test_a_run_is_the_same_to_the_bit(self, mode, options, monkeypatch):
        monkeypatch.setattr(offload, "BLOCK", 100)  # models as small as these would be one block otherwise
        plain, out = (self.trained(mode, words, options)[1] for words in (None, "moments, bases, ledger"))
        assert_equal_bits(weights_of(out), weights_of(plain))
        moments = [value for entries in out._run.stepper.state.values() for value in entries.values() if value.numel() > 1]
        bases = [tensor for sub in out.subspaces for tensor in sub.basis.tensors()]
        assert moments
        assert all(tensor.is_pinned() for tensor in moments + bases)

    @each_mode
    def test_checkpoints_are_those_of_any_run(self, mode):
        """What has been copied back is complete when the step has returned: the state is read at once."""
        saved = {}
        for words in (None, "moments, bases, ledger"):
            model, optimizer = self.trained(mode, words, {})
            saved[words] = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "cpu")
        assert_same(saved["moments, bases, ledger"], saved[None])
        again = [self.trained(mode, words, {}, saved[None])[1] for words in saved]
        assert_equal_bits(*map(weights_of, again))
