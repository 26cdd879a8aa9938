"""Simulated, tracked and measured memory: three ways to one report."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from lingrad import memory
from lingrad.errors import DependencyError, MemoryModelError, SpecError
from lingrad.maps import KroneckerMap
from lingrad.methods import Lingrad
from lingrad.models import LlamaShape, build_llama, open_model
from tests.support.memory import LEEWAY, METHODS, RECIPES, build


@pytest.mark.thinned(7)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_simulated_tracked_and_measured_agree(method, recipe):
    options = {"batch": 2, "length": 64, "device": "cpu", **RECIPES[recipe]}
    simulated = memory.simulate(build, METHODS[method], **options)
    measured = memory.measure(build, METHODS[method], **options)
    untracked = measured.breakdown.get("untracked", 0)
    tracked = measured.peak - untracked
    assert abs(simulated.peak - tracked) <= LEEWAY
    assert untracked <= LEEWAY
    assert abs(simulated.steady - measured.steady) <= LEEWAY
    for report in (simulated, measured):
        assert sum(report.breakdown.values()) == report.peak
        assert sum(report.steady_breakdown.values()) == report.steady
        assert "other" not in report.breakdown or report.breakdown["other"] <= LEEWAY
    for category in ("weight", "frozen", "basis", "coords", "coords gradient", "gradient"):
        assert simulated.steady_breakdown.get(category, 0) == measured.steady_breakdown.get(category, 0)


@pytest.mark.peers
@pytest.mark.parametrize("layerwise", [False, True])
def test_moments_in_8_bits_whose_updates_are_limited_by_a_norm(layerwise):
    """As galore_torch's are: its arguments reach bitsandbytes shifted by one, so that max_unorm is 100."""
    pytest.importorskip("bitsandbytes")
    kernel = torch.ops.bitsandbytes.optimizer_update_32bit
    method = memory.GaloreTorch(4, base="adamw8bit")
    report = memory.simulate(build, method, batch=2, length=16, layerwise=layerwise)
    assert "a float that is read back is 1.0 (norms are finite and not zero)" in report.assumptions
    assert report.steady_breakdown["moments"] > 0
    assert torch.ops.bitsandbytes.optimizer_update_32bit is kernel


@pytest.mark.slow
def test_resident_memory_of_a_process():
    """What the operating system says of a 130M Llama's step, within 5 % and 20 MB of the simulation."""
    program = """
        import ctypes, gc, torch
        from lingrad import memory
        from lingrad.memory import devices
        from lingrad.models import LLAMAS, build_llama
        torch.set_num_threads(1)
        method = memory.Lingrad("power(rank=64)", "adamw", "optimizer", {"lr": 1e-3})
        build = lambda: build_llama(LLAMAS["llama-130m"], seed=0)
        options = {"batch": 2, "length": 128, "device": "cpu", "checkpointing": True}
        small = lambda: build_llama(LLAMAS["llama-60m"].__class__(100, 32, 64, 1, 2, 128), seed=0)
        model = small()  # what libraries take once
        training = method.__class__("power(rank=4)", "adamw", "optimizer", {"lr": 1e-3}).prepare(model)
        ids = torch.zeros(1, 16, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        training.step()
        del model, training
        simulated = memory.simulate(build, method, **options)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = devices.resident()
        model = build()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        training = method.prepare(model)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        devices.reset_resident_peak()
        for _ in range(2):
            ids = torch.randint(32000, (2, 128))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            training.step()
            training.zero_grad()
        print(simulated.peak, devices.resident_peak() - before)
    """
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin"}  # freed memory goes back to the system
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    simulated, resident = map(int, done.stdout.split()[-2:])
    assert abs(simulated - resident) <= 0.05 * simulated + 20e6


class TestWhatCannotBeKnown:
    def simulate(self, module, forward, **options):
        return memory.simulate(
            lambda: nn.Sequential(module, nn.Linear(8, 8)), {"1": "svd(rank=2)"}, loss=lambda m: forward(m).sum(), **options
        )

    def x(self):
        return torch.randn(4, 8, device="meta")

    def test_autocast(self):
        def forward(model, **options):
            with torch.autocast("cuda", dtype=torch.bfloat16, **options):
                return model(self.x())

        with pytest.raises(MemoryModelError, match="autocast does nothing on the meta device"):
            self.simulate(nn.Identity(), forward)
        with torch.autocast("cpu"), pytest.raises(MemoryModelError, match="autocast does nothing on the meta device"):
            self.simulate(nn.Identity(), lambda m: m(self.x()))
        self.simulate(nn.Identity(), lambda m: forward(m, enabled=False))

    def test_shapes_that_depend_on_numbers(self):
        with pytest.raises(MemoryModelError, match="aten.index.Tensor cannot run on meta tensors"):
            self.simulate(nn.Identity(), lambda m: m(self.x())[self.x().sum(1) > 0])

    def test_integers_that_are_read_back(self):
        with pytest.raises(MemoryModelError, match="reads an integer \\(int64\\) back from the device"):
            self.simulate(nn.Identity(), lambda m: m(self.x())[: int(self.x().argmax())])

    def test_a_module_without_a_meta_path(self):
        class OnTheHost(nn.Module):
            def forward(self, x):
                return torch.from_numpy(x.detach().numpy()) + x

        with pytest.raises(MemoryModelError, match="Sequential cannot run on meta tensors: can't convert meta device type"):
            self.simulate(OnTheHost(), lambda m: m(self.x()))

    def test_a_model_that_names_its_device(self):
        with pytest.raises(MemoryModelError, match="'0.weight' was built on cpu, not on the meta device"):
            memory.simulate(lambda: nn.Sequential(nn.Linear(4, 4, device="cpu")), {"*": "svd(rank=2)"}, loss=lambda m: m)

    def test_a_model_whose_loss_nobody_knows(self):
        with pytest.raises(MemoryModelError, match="is no model of transformers, .*; give a function that computes its loss"):
            memory.simulate(lambda: nn.Sequential(nn.Linear(4, 4)), {"*": "svd(rank=2)"})

    def test_a_model_without_checkpointing(self):
        with pytest.raises(MemoryModelError, match="has no gradient_checkpointing_enable"):
            self.simulate(nn.Identity(), lambda m: m(self.x()), checkpointing=True)

    def test_cuda_is_not_measured_where_there_is_none(self):
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
        with pytest.raises(
            MemoryModelError, match="there is no CUDA device to measure on.*report 0 bytes; simulate it instead"
        ):
            memory.measure(build, "svd(rank=4)", device="cuda")
        with pytest.raises(MemoryModelError, match="there is no CUDA device to track"):
            memory.track(nn.Linear(2, 2), device="cuda")

    def test_options_of_a_method_belong_to_it(self):
        with pytest.raises(TypeError, match="base, lr must be given to the method itself: FullRank"):
            memory.simulate(build, memory.FullRank("sgd"), "sgd", lr=0.1)
        with pytest.raises(SpecError, match="galore_torch has no base 'lion'"):
            memory.simulate(build, memory.GaloreTorch(4, base="lion"))
        with pytest.raises(SpecError, match="device must be one of cuda, cpu, not 'tpu'"):
            memory.simulate(build, "svd(rank=4)", device="tpu")

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_simulation_leaves_torch_as_it_was(self, device, fails):
        def chosen():
            functional = torch.nn.functional
            attention, dropout = functional.scaled_dot_product_attention, functional.dropout
            devices = (
                torch_optimizer._get_fused_kernels_supported_devices()
                + torch_optimizer._get_foreach_kernels_supported_devices()
            )
            return (
                attention,
                dropout,
                devices,
                torch.cuda.synchronize,
                torch.utils._python_dispatch._get_current_dispatch_mode(),
            )

        before = chosen()
        if fails:
            with pytest.raises(MemoryModelError):
                self.simulate(nn.Identity(), lambda m: m(self.x())[: int(self.x().argmax())], device=device)
        else:
            self.simulate(nn.Identity(), lambda m: m(self.x()), device=device)
        assert chosen() == before


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "adaptor"}, "mode must be one of optimizer, adapter, not 'adaptor'"),
            ({"attention": "sparse"}, "attention must be one of flash, efficient, math, not 'sparse'"),
            ({"steps": 0}, "steps must be a whole number, 1 or more, not 0"),
            ({"batch": 0}, "batch must be a whole number, 1 or more, not 0"),
            ({"capacity": "24GiB"}, "capacity must be a number of bytes, not '24GiB'"),
            ({"dtype": "bfloat16"}, "dtype must be a torch.dtype, not 'bfloat16'"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(SpecError, match=message):
            memory.simulate(build, "svd(rank=4)", **options)

    def test_a_model_instead_of_what_makes_it(self):
        for run in (memory.simulate, memory.measure):
            with pytest.raises(SpecError, match="build must be a function that builds the model, .* Got a LlamaForCausalLM"):
                run(build(), "svd(rank=4)")

    def test_low_bit_layers_have_no_meta_path(self):
        bnb = pytest.importorskip("bitsandbytes")

        def model():
            return nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False), nn.Linear(64, 64))

        def loss(m):
            return m(torch.randn(4, 64, device="meta")).sum()

        with pytest.raises(MemoryModelError, match="cannot run on meta tensors"):
            memory.simulate(model, {"1": "svd(rank=4)"}, loss=loss)

    def test_the_mode_of_an_estimate(self):
        with pytest.raises(SpecError, match="mode must be one of optimizer, adapter"):
            memory.estimate(open_model("demo"), "svd(rank=4)", "adamw", "adaptor")

    def test_a_model_that_is_no_language_model(self):
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        build = lambda: BertForSequenceClassification(config)  # noqa: E731
        simulated = memory.simulate(build, "svd(rank=4)", length=8, device="cpu")
        assert simulated.peak > simulated.steady > 0
        assert memory.measure(build, "svd(rank=4)", length=8, device="cpu").steady == simulated.steady


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_grouped_heads_on_the_cpu(mode, dtype):
    shape = LlamaShape(100, 64, 172, 2, 4, 64, groups=2)
    options = {"length": 32, "batch": 4, "dtype": dtype, "device": "cpu", "lr": 1e-3}
    make = lambda: build_llama(shape, seed=0)  # noqa: E731
    simulated, measured = (run(make, "power(rank=8)", "adamw", mode, **options) for run in (memory.simulate, memory.measure))
    assert abs(simulated.peak - measured.peak) <= LEEWAY


class TestChoicesOfCuda:
    def report(self, **options):
        return memory.simulate(build, "svd(rank=16)", batch=2, length=128, **options)

    def test_attention(self):
        flash = self.report(dtype=torch.bfloat16)
        single = self.report()
        formula = self.report(dtype=torch.bfloat16, attention="math")
        assert "attention is the flash kernel" in flash.assumptions
        assert "attention is the memory-efficient kernel" in single.assumptions
        assert formula.peak > flash.peak  # it holds [heads, length, length]

    def test_dropout_keeps_its_mask(self):
        def model():
            return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.Linear(64, 64))

        def run(device):
            return memory.simulate(
                model, {"0": "svd(rank=4)"}, loss=lambda m: m(torch.randn(256, 64, device="meta")).sum(), device=device
            )

        assert any("native_dropout" in said for said in run("cuda").assumptions)
        assert not any("native_dropout" in said for said in run("cpu").assumptions)

    def test_grouped_heads(self):
        shape = LlamaShape(100, 64, 172, 2, 4, 64, groups=2)
        for dtype, kernel in ((torch.bfloat16, "flash kernel"), (torch.float32, "plain formula")):
            report = memory.simulate(lambda: build_llama(shape, seed=0), "svd(rank=8)", dtype=dtype, length=32)
            assert any(kernel in said for said in report.assumptions)

    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_values_of_another_width_than_keys(self, device):
        """As in DeepSeek's attention: flash attention does not apply, on either device."""

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k, self.v, self.o = (nn.Linear(m, n) for m, n in ((64, 64), (64, 64), (64, 32), (32, 64)))

            def forward(self, x):
                q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
                made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                return self.o(made.transpose(1, 2).flatten(2))

        def loss(model):
            return model(torch.randn(2, 16, 64, device="meta", dtype=torch.bfloat16)).float().sum()

        report = memory.simulate(Attention, {"*": "svd(rank=4)"}, loss=loss, dtype=torch.bfloat16, device=device)
        assert not any("flash" in said for said in report.assumptions)

    @pytest.mark.parametrize(("device", "rounded"), [("cuda", True), ("cpu", False)])
    def test_merges_into_bfloat16(self, device, rounded, monkeypatch):
        """A device with tensor cores multiplies in bfloat16, and takes no memory for S z in float32."""
        calls, original = [], KroneckerMap.add_rounded_lift_
        monkeypatch.setattr(KroneckerMap, "add_rounded_lift_", lambda *args: (calls.append(1), original(*args)))
        self.report(dtype=torch.bfloat16, device=device)
        assert bool(calls) == rounded

    def test_verdict(self):
        small, large = self.report(capacity=2**20), self.report(capacity=2**33)
        assert small.fits is False
        assert large.fits is True
        assert "does NOT fit in 1.00 MiB" in str(small)
        assert "fits in 8.00 GiB" in str(large)
        assert large.reserved >= large.allocated >= large.peak


@pytest.mark.slow
def test_a_7b_run_is_simulated_whole():
    report = memory.simulate(
        lambda: open_model("llama-7b"), "svd(rank=1024)", dtype=torch.bfloat16, length=256, checkpointing=True, lr=1e-3
    )
    assert report.breakdown["weight"] == 2 * 6_738_415_616


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match=r"LoRA needs .*peft.*lingrad\[hf\]"):
        memory.simulate(build, memory.Lora(4))


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_fused_experts(mode):
    """Their products, grouped by expert, hold in a simulation what they hold; a real device's kernels may take more."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 4}

    def built():
        config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
        return MixtralForCausalLM(config).to(torch.bfloat16)  # the only dtype of grouped products on meta tensors

    method = Lingrad("svd(rank=8, every=200)", "adamw", mode, {"lr": 1e-3})
    simulated, measured = (run(built, method, batch=2, length=32, device="cpu") for run in (memory.simulate, memory.measure))
    for name in simulated.breakdown.keys() | measured.breakdown.keys() - {"untracked"}:
        assert abs(simulated.breakdown.get(name, 0) - measured.breakdown.get(name, 0)) <= LEEWAY, name
    assert simulated.steady == measured.steady
