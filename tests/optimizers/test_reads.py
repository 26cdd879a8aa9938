"""Bases that read the parameter are refused, wherever and whenever they do; those that only add to it are not."""

import re

import pytest
import torch
from torch import nn

import lingrad
from lingrad import optimizers
from lingrad.errors import DualityError, SpecError
from lingrad.optimizers import checks
from lingrad.optimizers.reads import ParameterReads
from tests.support import readers


def check(base, **options):
    checks.check_reads_only_gradients(optimizers.find(base, {"lr": 1e-3, **options}, decay=False))


@torch.no_grad()
def _gap(one, other):
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def apart(base, **options):
    """How far the modes are from each other after ten steps in float64, with matrices and vectors."""
    weights = []
    for make in (lingrad.wrap, lingrad.adapt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).double()
        opt = make(model, "random(rank=4, every=0)", base, lr=1e-3, **options)
        x = torch.randn(8, 16).double()
        start = {name: weight.clone() for name, weight in opt.weights().items()}
        for _ in range(10):
            opt.zero_grad()
            (model(x) - x).square().mean().backward()
            opt.step()
        weights.append(opt.weights())
    assert all((weights[0][name] - was).norm() > 0 for name, was in start.items())
    return _gap(*weights)


class TestRefused:
    @pytest.mark.parametrize(("base", "message"), [pytest.param(*case, id=name) for name, *case in readers.READERS])
    def test_what_reads_the_parameter(self, base, message):
        with pytest.raises(DualityError, match="reads the parameter, not only its gradient: ") as caught:
            check(base)
        assert any(part in str(caught.value) for part in message.split("|")), str(caught.value)

    @pytest.mark.parametrize(
        "options", [{"scale_parameter": True}, {"scale_parameter": True, "relative_step": True, "lr": None}]
    )
    def test_adafactor_with_parameter_scaling(self, options):
        with pytest.raises(DualityError, match="by norm"):
            check("adafactor", **options)

    @pytest.mark.parametrize("base", ["LAMB", "LAMB8bit", "LAMB32bit", "LARS", "LARS8bit"])
    def test_trust_ratios_of_bitsandbytes_on_either_side_of_its_threshold(self, base):
        bnb = pytest.importorskip("bitsandbytes")
        with pytest.raises(DualityError, match="in Python .by norm"):
            check(getattr(bnb.optim, base), **({"momentum": 0.9} if "LARS" in base else {}))


class TestAccepted:
    @pytest.mark.parametrize("base", [pytest.param(base, id=name) for name, base in readers.ADDERS])
    def test_what_only_adds_to_the_parameter(self, base):
        check(base)
        assert apart(base) < 1e-12

    @pytest.mark.parametrize(
        "name",
        [name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)],
    )
    def test_every_class_of_torch_that_reads_only_gradients_keeps_the_modes_together(self, name):
        base = getattr(torch.optim, name)
        if name in ("Adafactor", "ASGD"):
            with pytest.raises(DualityError):
                check(base)
        elif name in ("Optimizer", "LBFGS", "SparseAdam"):
            with pytest.raises(SpecError):
                check(base)
        else:
            # Muon orthogonalises in bfloat16
            assert apart(base) < (1e-3 if name == "Muon" else 1e-12)

    @pytest.mark.parametrize(
        "options", [{"foreach": True}, {"fused": True}, {"fused": False}, {"amsgrad": True}, {"maximize": True}]
    )
    def test_every_implementation_of_adam(self, options):
        for base in (torch.optim.Adam, torch.optim.AdamW):
            check(base, **options)
            assert apart(base, **options) < 1e-12

    @pytest.mark.parametrize("name", ["RAdam", "NAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "Adagrad", "SGD"])
    def test_every_implementation_over_lists(self, name):
        check(getattr(torch.optim, name), foreach=True)

    @pytest.mark.parametrize("base", ["Adam", "Adam8bit", "AdamW8bit", "Adagrad8bit", "RMSprop8bit", "Lion8bit", "AdEMAMix"])
    def test_kernels_of_bitsandbytes(self, base):
        check(getattr(pytest.importorskip("bitsandbytes").optim, base))

    @pytest.mark.slow
    def test_a_compiled_step(self):
        compiled = torch.compile(lambda p, gradient: p - gradient)
        check(readers.instead(lambda p, state: p.copy_(compiled(p, p.grad))))


class TestWords:
    @pytest.mark.parametrize(
        "error", [AssertionError(), KeyError("x"), AttributeError("no x"), UnboundLocalError("x"), Exception("x")]
    )
    @pytest.mark.parametrize("options", [{}, {"moments": "8bit"}])
    def test_an_error_of_the_step_is_one_of_ours(self, error, options):
        def fails(p, state):
            raise error

        with pytest.raises(SpecError, match=rf"base 'base' cannot be used: .* failed with: .*{str(error) or 'AssertionError'}"):
            check(readers.instead(fails), **options)

    def test_an_error_of_the_constructor(self):
        class Fails(torch.optim.SGD):
            def __init__(self, params, lr):
                raise AttributeError("'list' object has no attribute 'named_parameters'")

        with pytest.raises(SpecError, match="base 'Fails' refused its options .*'list' object has no attribute"):
            check(Fails)

    def test_what_has_no_signature(self):
        with pytest.raises(SpecError, match="base 'dict' cannot be used, since its options cannot be read"):
            check(dict)

    def test_a_factory_that_has_no_hash(self):
        class Factory(dict):
            def __call__(self, params, lr):
                return torch.optim.SGD(params, lr=lr)

        check(Factory())

    def test_a_step_that_only_a_mode_cannot_follow_is_compared(self, monkeypatch):
        def fails(self, func, types, args=(), kwargs=None):
            raise NotImplementedError("no rule for this operator")

        monkeypatch.setattr(ParameterReads, "__torch_dispatch__", fails)
        check(readers.instead(lambda p, state: p.sub_(p.grad)))
        with pytest.raises(DualityError, match="with equal gradients it differs"):
            check(readers.instead(readers.lamb))


class TestEachKindOfParameter:
    def model(self):
        return nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8))

    def test_muon_as_a_class_steps_matrices_and_adamw_the_rest(self):
        class Mine(torch.optim.Muon):
            pass

        for base in (torch.optim.Muon, Mine):
            model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
            optimizer = lingrad.wrap(model, "svd(rank=4)", base, lr=1e-3, betas=(0.8, 0.9))
            model(torch.randn(3, 16)).square().mean().backward()
            optimizer.step()
            built = optimizer._run.stepper.built(optimizer.param_groups)
            assert [type(one.optimizer) for one in built] == [base, torch.optim.AdamW]
            assert built[0].optimizer.param_groups[0]["adjust_lr_fn"] is None  # its own default, not that of the name

    def test_what_a_base_cannot_step_is_named_when_the_run_is_made(self):
        class Matrices(torch.optim.SGD):
            def __init__(self, params, lr=1e-3):
                super().__init__(params, lr=lr)
                if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
                    raise ValueError("2D parameters only")

        with pytest.raises(
            SpecError, match=r"base 'Matrices' cannot step 0.bias, a parameter of 1 dimension: .*2D parameters only.*Freeze it"
        ):
            lingrad.wrap(self.model(), {"2.*": "svd(rank=4)", "0.weight": "svd(rank=2)"}, Matrices)
        with pytest.raises(SpecError, match=r"cannot step 0.weight, a parameter of 3 dimensions"):
            lingrad.wrap(self.model(), {"2.*": "svd(rank=4)"}, Matrices)
        linear = nn.Linear(16, 8, bias=False)
        lingrad.wrap(linear, "svd(rank=4)", Matrices)

    @pytest.mark.parametrize(
        "options", [{}, {"moments": "8bit"}, {"layerwise": True}, {"foreach": True, "lr": torch.tensor(1e-3)}]
    )
    def test_capturable_is_refused_for_what_is_not_on_a_gpu(self, options):
        for base in ("adamw", torch.optim.RAdam, lambda params, lr: torch.optim.Adam(params, lr=lr, capturable=True)):
            option = {} if base.__class__.__name__ == "function" else {"capturable": True}
            if option or not options:
                model = nn.Sequential(nn.Linear(16, 8, bias=False))
                with pytest.raises(SpecError, match="capturable=True is for parameters on a GPU, and 0.weight is on the CPU"):
                    lingrad.wrap(model, "svd(rank=4)", base, **({"lr": 1e-3} | option | options))
                check(base, **option)  # what it reads is another question


class TestWhenItIsRun:
    def count(self, base, times, **options):
        made = []

        class Counted(base):
            def __init__(self, params, lr=1e-3, **own):
                made.append(1)
                super().__init__(params, lr=lr)

        for _ in range(times):
            check(Counted, **options)
        return len(made)

    def test_a_class_is_run_once_for_the_same_options(self):
        assert self.count(torch.optim.SGD, 1) == self.count(torch.optim.SGD, 3)

    def test_options_that_may_change_and_factories_are_run_each_time(self):
        assert self.count(torch.optim.SGD, 3, other=torch.zeros(1)) == 3 * self.count(torch.optim.SGD, 1)
        decays = [0.0, 0.1]

        def factory(params, lr):
            return torch.optim.AdamW(params, lr=lr, weight_decay=decays[0])

        check(factory)
        decays.pop(0)
        with pytest.raises(DualityError):
            check(factory)

    def test_the_parameters_are_followed_in_the_step_only(self):
        param = nn.Parameter(torch.zeros(3))
        reads = ParameterReads([param])
        with reads.step():
            param.detach().add_(1)
        copy = param.detach().clone()
        with reads.step():
            param.detach().add_(copy)
        assert reads.found == ""
        with reads.step():
            copy = param.detach().clone()
        assert re.fullmatch(r"it keeps a copy of the parameter \(by clone\)", reads.found)
