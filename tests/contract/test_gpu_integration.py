"""Checkpoints, moves, scalers, autocast and clipping on a CUDA device."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lingrad
from lingrad import optimizers
from lingrad.errors import DependencyError
from tests.support.gpu import ACROSS, DEVICE, RUN, TOLERANCE, assert_lives_on, changes_of, moved
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import EVERY_KIND, LINEAR, MODES, assert_equal_bits, each_mode, through_a_file, weights_of


def find_base(name, options):
    try:
        return optimizers.find(name, options, decay=False)
    except DependencyError as error:
        pytest.skip(str(error))


class TestCheckpoints:
    SPECS = (
        "svd(rank=4, every=4)",
        "power(rank=4, every=4, side=both)",
        "random(rank=4, every=4)",
        "random(rank=4, every=4, kind=rows)",
        # with Adam's own eps of 1e-8 the basis takes steps along what is rounding, where a unit is dead
        "pca(rank=4, optimizer=adam(eps=0.0001))",
        "kron(left=svd(rank=4, every=4), right=random(rank=3, every=4))",
    )

    @staticmethod
    def assert_resumes(build, make, batches, allowed, *, source=DEVICE, target=DEVICE, loaded_to=None, at=3):
        """Half a run on one device, saved, loaded, and the other half on another; against the whole run on the first."""
        halves = [moved(batches, source), moved(batches, target)]
        straight, first, resumed = build().to(source), build().to(source), build().to(target)
        expected, optimizer = make(straight), make(first)
        train(straight, expected, halves[0], zoo_loss, schedule=False)
        train(first, optimizer, halves[0][:at], zoo_loss, schedule=False)
        saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, loaded_to)
        optimizer = make(resumed)
        resumed.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        assert_lives_on(optimizer, target)
        train(resumed, optimizer, halves[1][at:], zoo_loss, schedule=False)
        assert_lives_on(optimizer, target)
        if allowed == 0:
            assert_equal_bits(resumed.state_dict(), straight.state_dict())
        else:
            assert gap(weights_of(optimizer), weights_of(expected)) <= allowed

    @each_mode
    @pytest.mark.parametrize("at", [3, 4, 5])  # before, at and after the refresh of step 4
    @pytest.mark.parametrize("spec", SPECS)
    def test_resuming_is_exact(self, spec, at, mode):
        self.assert_resumes(zoo, lambda m: MODES[mode](m, {"*": spec}, lr=1e-2), zoo_batches(7), 0, at=at)

    @each_mode
    @pytest.mark.parametrize("name", optimizers.names())
    def test_resuming_is_exact_for_every_base(self, name, mode):
        if name == "adamw8bit":
            pytest.importorskip("bitsandbytes")
        find_base(name, {})
        options = {"sgd": {"lr": 0.1, "momentum": 0.9}, "adamw8bit": {"lr": 1e-2, "min_8bit_size": 16}}.get(name, {"lr": 1e-3})

        def make(model):
            return MODES[mode](model, {"*": "svd(rank=4, every=4)"}, name, **options)

        self.assert_resumes(lambda: zoo(torch.float32), make, zoo_batches(6), 0)

    @each_mode
    @pytest.mark.parametrize("loaded_to", [None, "cpu", DEVICE])
    @pytest.mark.parametrize(("source", "target"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
    @pytest.mark.parametrize("spec", [SPECS[0], SPECS[2], SPECS[4]])
    def test_going_on_on_another_device(self, spec, source, target, loaded_to, mode):
        """Wherever torch.load put the tensors: ``map_location="cpu"`` is what programs write, for a run on any device."""

        def make(model):
            return MODES[mode](model, {"*": spec}, **RUN)

        self.assert_resumes(zoo, make, zoo_batches(6), ACROSS, source=source, target=target, loaded_to=loaded_to)

    @each_mode
    @pytest.mark.parametrize("loaded_to", [None, "cpu"])
    @pytest.mark.parametrize(
        ("name", "options"),
        [("adam", {"foreach": True}), ("rmsprop", {"momentum": 0.9}), ("adagrad", {}), ("sgd", {"momentum": 0.9})],
    )
    def test_step_counters_stay_where_the_base_keeps_them(self, name, options, loaded_to, mode):
        """A counter that was on the CPU and is loaded to the GPU makes the host wait in every step."""
        model = zoo(torch.float32).to(DEVICE)
        optimizer = MODES[mode](model, EVERY_KIND, name, lr=1e-3, **options)
        train(model, optimizer, moved(zoo_batches(2)), zoo_loss)

        def places(of):
            return {
                (index, key): value.device.type
                for index, entries in of.state_dict()["state"].items()
                for key, value in entries.items()
                if isinstance(value, torch.Tensor)
            }

        expected = places(optimizer)
        other = zoo(torch.float32).to(DEVICE)
        resumed = MODES[mode](other, EVERY_KIND, name, lr=1e-3, **options)
        resumed.load_state_dict(through_a_file(optimizer.state_dict(), loaded_to))
        assert places(resumed) == expected


class TestMoves:
    """model.to and its kin take coordinates, bases and the base's memory along."""

    SPECS = (*TestCheckpoints.SPECS, "full()")

    @staticmethod
    def expected(mode, spec, base="adamw", **options):
        model = zoo()
        optimizer = MODES[mode](model, {"*": spec}, base, **options)
        train(model, optimizer, zoo_batches(6), zoo_loss, schedule=False)
        return weights_of(optimizer)

    @each_mode
    @pytest.mark.parametrize("spec", SPECS)
    def test_before_the_first_step(self, spec, mode):
        """A model that is wrapped where it was loaded, and then sent to the GPU."""
        model = zoo()
        optimizer = MODES[mode](model, {"*": spec}, **RUN)
        model.to(DEVICE)
        train(model, optimizer, moved(zoo_batches(6)), zoo_loss, schedule=False)
        assert_lives_on(optimizer, DEVICE)
        assert gap(weights_of(optimizer), self.expected(mode, spec, **RUN)) <= ACROSS

    @each_mode
    @pytest.mark.parametrize(
        ("spec", "base", "options"),
        [(spec, "adamw", RUN) for spec in SPECS]
        + [
            ("svd(rank=4, every=4)", "adam", {"lr": 1e-2, "eps": 1e-4, "foreach": True}),
            ("svd(rank=4, every=4)", "sgd", {"lr": 0.1, "momentum": 0.9}),
            ("svd(rank=4, every=4)", "rmsprop", {"lr": 1e-2, "eps": 1e-3, "momentum": 0.9}),
            ("svd(rank=4, every=4)", "adagrad", {"lr": 1e-2, "eps": 1e-4}),
        ],
    )
    @pytest.mark.parametrize("there", ["cpu", DEVICE])
    def test_in_mid_run(self, spec, base, options, there, mode):
        """There, back and there again; the second move is after a refresh."""
        back = DEVICE if there == "cpu" else "cpu"
        model = zoo().to(there)
        optimizer = MODES[mode](model, {"*": spec}, base, **options)
        batches = zoo_batches(6)
        for device, part in ((there, batches[:2]), (back, batches[2:5]), (there, batches[5:])):
            model.to(device)
            train(model, optimizer, moved(part, device), zoo_loss, schedule=False)
            assert_lives_on(optimizer, device)
        assert gap(weights_of(optimizer), self.expected(mode, spec, base, **options)) <= ACROSS

    @each_mode
    @pytest.mark.parametrize("spec", ["svd(rank=4, every=4)", "random(rank=4, every=3)", "random(rank=4, every=3, kind=rows)"])
    def test_a_default_device(self, spec, mode):
        """Under ``torch.set_default_device`` what is drawn on the CPU still is."""
        found, batches = [], moved(zoo_batches(5))
        for context in (contextlib.nullcontext(), torch.device(DEVICE)):
            model = zoo().to(DEVICE)
            with context:
                optimizer = MODES[mode](model, {"*": spec}, **RUN, carry="rotate")
                train(model, optimizer, batches, zoo_loss)
            found.append(weights_of(optimizer))
        assert_equal_bits(*found)


class TestGradScaler:
    HUGE = 2.0**32

    @staticmethod
    def state_of(optimizer):
        return optimizer._run.step, [sub.basis.refreshes for sub in optimizer.subspaces], weights_of(optimizer)

    def run(self, model, optimizer, batches, loss_of, scaler, *, overflowing=(), clip=None, autocast=None):
        """Each step one micro-batch or more; those named overflow, and must leave no trace."""
        losses = []
        for step, micro_batches in enumerate(batches):
            optimizer.zero_grad()
            for batch in micro_batches:
                with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
                    loss = loss_of(model, batch) / len(micro_batches)
                blown = step in overflowing and autocast != torch.float16
                scaler.scale(loss * float("inf") if blown else loss).backward()
            before = self.state_of(optimizer)
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            # float16 overflows by itself where the scale is too large; it backs off to what fits
            scaler.update(self.HUGE if autocast == torch.float16 and step + 1 in overflowing else None)
            after = self.state_of(optimizer)
            if step in overflowing:
                assert after[:2] == before[:2]
                assert_equal_bits(after[2], before[2])
            else:
                assert after[0] == before[0] + 1
                losses.append(float(loss.detach()))
        return losses

    @each_mode
    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_a_skipped_step_leaves_no_trace(self, mode, clip):
        """Skipped: the first step, which refreshes; one off a refresh; two in a row on a refresh; the last. A scale is a power
        of two, so that the run is the one without a scaler and without those steps."""
        batches = moved(zoo_batches(8))
        bad, order = (0, 3, 5, 6, 12), iter(batches)
        longer = [batches[0] if step in bad else next(order) for step in range(len(batches) + len(bad))]
        found = []
        for enabled in (False, True):
            model = zoo().to(DEVICE)
            optimizer = MODES[mode](model, EVERY_KIND, lr=1e-2, weight_decay=0.1)
            scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12, growth_interval=3, enabled=enabled)
            steps, overflowing = (longer, bad) if enabled else (batches, ())
            self.run(model, optimizer, steps, zoo_loss, scaler, overflowing=overflowing, clip=clip)
            assert {sub.basis.refreshes for sub in optimizer.subspaces} == {3}
            found.append(weights_of(optimizer))
        assert gap(*found) <= TOLERANCE

    @each_mode
    @pytest.mark.parametrize("clip", [None, 10.0])
    def test_float16_autocast(self, mode, clip):
        """What seven steps train, against float32, to 3 %: seen 0.6 % where each product is rounded to 2^-8, as bfloat16 is.
        Overflows, of float16 itself: the first step, which refreshes; one off a refresh; one on the next refresh."""
        ids = text_batches(1, rows=4)[0][0].to(DEVICE)
        start, found, losses = dict(llama(torch.float32).named_parameters()), [], []
        for autocast in (None, torch.float16):
            model = llama(torch.float32).to(DEVICE)
            optimizer = MODES[mode](model, LINEAR, "sgd", lr=0.3, momentum=0.5)
            half = autocast is not None
            scaler = torch.amp.GradScaler(DEVICE, init_scale=self.HUGE, backoff_factor=2.0**-18, enabled=half)
            steps, overflowing = (10, (0, 2, 5)) if half else (7, ())
            losses.append(
                self.run(
                    model, optimizer, [[ids]] * steps, text_loss, scaler, overflowing=overflowing, clip=clip, autocast=autocast
                )
            )
            assert not half or scaler.get_scale() == 2.0**14
            assert {sub.basis.refreshes for sub in optimizer.subspaces} == {3}
            assert {sub.coords.dtype for sub in optimizer.subspaces} == {torch.float32}
            assert {weight.dtype for weight in optimizer.weights().values()} == {torch.float32}
            found.append(changes_of(optimizer, start))
        exact, halved = found
        assert (halved - exact).norm() <= 0.03 * exact.norm()
        assert all(series[-1] < series[0] - 0.1 for series in losses)


@pytest.mark.parametrize("rules", [LINEAR, {"*": "random(rank=4, every=3)"}])
def test_bfloat16_autocast(rules):
    """As on the CPU: the modes, and float32, differ by about one rounding to 2^-8 of what is trained; allowed 3 %."""
    ids = text_batches(1, rows=4)[0][0].to(DEVICE)
    start, found, losses = dict(llama(torch.float32).named_parameters()), [], []
    for mode, enabled in (("optimizer", True), ("adapter", True), ("optimizer", False)):
        model = llama(torch.float32).to(DEVICE)
        optimizer = MODES[mode](model, rules, "sgd", lr=0.3, momentum=0.5)
        for _ in range(7):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                loss = text_loss(model, ids)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert {sub.coords.grad.dtype for sub in optimizer.subspaces} == {torch.float32}
        found.append(changes_of(optimizer, start))
    wrapped, adapted, exact = found
    assert (adapted - wrapped).norm() <= 0.03 * wrapped.norm()
    assert (wrapped - exact).norm() <= 0.03 * exact.norm()
    assert losses[6] < losses[0] - 0.1


@pytest.mark.parametrize("ours", [True, False])
def test_clipping(ours):
    """By ``opt.clip_grad_norm_`` and from outside: the same norms and weights in both modes and on both devices."""
    norms, weights = [], []
    for device, mode in (("cpu", "optimizer"), (DEVICE, "optimizer"), (DEVICE, "adapter")):
        model = zoo().to(device)
        optimizer = MODES[mode](model, EVERY_KIND, **RUN)
        found = []
        for micro_batches in moved(zoo_batches(8), device):
            optimizer.zero_grad()
            for batch in micro_batches:
                (zoo_loss(model, batch) / len(micro_batches)).backward()
            norm = optimizer.clip_grad_norm_(0.05) if ours else nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            assert norm.device.type == device
            found.append(float(norm))
            optimizer.step()
        assert min(found) > 0.05
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {3}
        norms.append(torch.tensor(found, dtype=torch.float64))
        weights.append(weights_of(optimizer))
    on_cpu, wrapped, adapted = weights
    torch.testing.assert_close(norms[2], norms[1], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(norms[1], norms[0], rtol=ACROSS, atol=0)
    assert gap(adapted, wrapped) <= TOLERANCE
    assert gap(wrapped, on_cpu) <= ACROSS


class TestActivationCheckpointing:
    """The forward is run again inside backward, which a GPU does in a thread of its own."""

    @each_mode
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_by_torch(self, mode, reentrant):
        gradients = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double().to(DEVICE)
            optimizer = MODES[mode](model, {"*": "svd(rank=3, every=3)"}, "sgd", lr=0.1)
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(5, 8, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
            for _ in range(5):
                optimizer.zero_grad()
                hidden = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
                hidden.tanh().sum().backward()
                optimizer.step()
            gradients.append([sub.coords.grad for sub in optimizer.subspaces])
            assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}
        for plain, again in zip(*gradients, strict=True):
            torch.testing.assert_close(again, plain, rtol=TOLERANCE, atol=TOLERANCE)

    @each_mode
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
    def test_by_transformers(self, mode, reentrant):
        found = []
        for checkpointed in (False, True):
            model = llama().to(DEVICE)
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            optimizer = MODES[mode](model, LINEAR, **RUN)
            calls = []
            model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            train(model.train(), optimizer, moved(text_batches(5)), clip=1.0)
            assert len(calls) == 15 * (1 + checkpointed)
            assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}
            found.append(weights_of(optimizer))
        assert gap(*found) <= TOLERANCE


def test_a_copy_of_the_model_evaluates_on_either_device():
    model = zoo().to(DEVICE)
    optimizer = lingrad.adapt(model, EVERY_KIND, **RUN)
    train(model, optimizer, moved(zoo_batches(4)), zoo_loss)
    ids = zoo_batches(1, seed=3)[0][0]
    with torch.no_grad():
        expected = model(ids.to(DEVICE))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids.to(DEVICE)), expected)
        torch.testing.assert_close(twin.cpu()(ids), expected.cpu(), rtol=ACROSS, atol=ACROSS)
        assert torch.equal(model(ids.to(DEVICE)), expected)
