"""Gradient scalers, autocast, and merges into 16-bit weights."""

import pytest
import torch
from torch import nn

import lingrad
from lingrad.maps import BatchedMap, KroneckerMap, SelectionMap, TwoSidedMap
from lingrad.models import LlamaShape, build_llama
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import EVERY_KIND, LINEAR, MODELS, MODES, assert_equal_bits, each_mode, each_model, weights_of

# In float64 two runs of the same mathematics part by rounding, 1e-16 a step, times the inverse gaps of singular values.
TOLERANCE = 1e-12


class TestGradScaler:
    """Its scale is a power of two, so that nothing but the exponent of a gradient changes."""

    @staticmethod
    def run(kind, mode, batches, *, scaled=True, clip=None, unscale=False, overflowing=()):
        build, rules, _, loss_of = MODELS[kind]
        model = build()
        optimizer = MODES[mode](model, rules, lr=1e-2, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3, enabled=scaled)
        for step, micro_batches in enumerate(batches):
            optimizer.zero_grad()
            for batch in micro_batches:
                loss = loss_of(model, batch) / len(micro_batches)
                scaler.scale(loss * float("inf") if step in overflowing else loss).backward()
            before = (optimizer._run.step, [sub.basis.refreshes for sub in optimizer.subspaces], weights_of(optimizer))
            if unscale or clip is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip or step in overflowing
            scaler.step(optimizer)
            scaler.update()
            after = (optimizer._run.step, [sub.basis.refreshes for sub in optimizer.subspaces], weights_of(optimizer))
            if step in overflowing:
                assert after[:2] == before[:2]
                assert_equal_bits(after[2], before[2])
            else:
                assert after[0] == before[0] + 1
        assert scaler.get_scale() != 2.0**12 or not scaled  # it grew, or backed off, in the run
        return optimizer.weights()

    @each_model
    @each_mode
    @pytest.mark.parametrize(("unscale", "clip"), [(False, None), (True, None), (True, 0.05)])
    def test_a_scaled_run_is_the_run_without_a_scaler(self, kind, mode, unscale, clip):
        batches = MODELS[kind][2](8)
        expected = self.run(kind, mode, batches, scaled=False, clip=clip)
        assert gap(self.run(kind, mode, batches, clip=clip, unscale=unscale), expected) <= TOLERANCE

    @each_model
    @each_mode
    @pytest.mark.parametrize("clip", [None, 0.05])
    def test_a_skipped_step_leaves_no_trace(self, kind, mode, clip):
        """Skipped: the first step, which refreshes; one off a refresh; two in a row on a refresh; the last."""
        batches = MODELS[kind][2](8)
        bad, order = (0, 3, 5, 6, 12), iter(batches)
        longer = [batches[0] if step in bad else next(order) for step in range(len(batches) + len(bad))]
        expected = self.run(kind, mode, batches, scaled=False, clip=clip)
        assert gap(self.run(kind, mode, longer, clip=clip, unscale=True, overflowing=bad), expected) <= TOLERANCE

    @each_mode
    def test_the_clip_of_the_optimizer_works_on_unscaled_gradients(self, mode):
        weights, norms = [], []
        for scaled in (False, True):
            model = llama()
            optimizer = MODES[mode](model, LINEAR, lr=1e-2)
            scaler = torch.amp.GradScaler("cpu", enabled=scaled)
            for micro_batches in text_batches(7, micro=1):
                optimizer.zero_grad()
                scaler.scale(text_loss(model, micro_batches[0])).backward()
                scaler.unscale_(optimizer)
                norms.append(optimizer.clip_grad_norm_(0.05))
                scaler.step(optimizer)
                scaler.update()
            weights.append(optimizer.weights())
        torch.testing.assert_close(norms[:7], norms[7:], rtol=TOLERANCE, atol=0)
        assert gap(*weights) <= TOLERANCE


class TestLowPrecision:
    @staticmethod
    def assert_stays_wide(optimizer, dtype):
        for attachment in optimizer.attachments:
            assert attachment.sub.weight.param.dtype == dtype
            coords = attachment.sub.coords
            assert coords.dtype == torch.float32
            assert optimizer.state[coords]["exp_avg"].dtype == optimizer.state[coords]["exp_avg_sq"].dtype == torch.float32

    @pytest.mark.parametrize("rules", [LINEAR, {"*": "random(rank=4, every=3)"}])
    def test_autocast(self, rules):
        """Coordinates and weights stay float32. Layers round W + S z to bfloat16 (2^-8) in one mode, W and S z apart in the
        other: what is trained in seven steps differs by about one such rounding; seen 5.6e-3 of it, four times that allowed."""
        ids = text_batches(1, rows=4)[0][0]
        start, found, losses = dict(llama(torch.float32).named_parameters()), [], []
        for mode, dtype in (("optimizer", torch.bfloat16), ("adapter", torch.bfloat16), ("optimizer", torch.float32)):
            model = llama(torch.float32)
            optimizer = MODES[mode](model, rules, "sgd", lr=0.3, momentum=0.5)
            for _ in range(7):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = text_loss(model, ids)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert {sub.coords.dtype for sub in optimizer.subspaces} == {torch.float32}
            assert {sub.coords.grad.dtype for sub in optimizer.subspaces} == {torch.float32}
            weights = weights_of(optimizer)
            assert {weight.dtype for weight in weights.values()} == {torch.float32}
            found.append(torch.cat([(weight - start[name].detach()).flatten() for name, weight in weights.items()]))
        wrapped, adapted, exact = found
        assert (adapted - wrapped).norm() <= 0.02 * wrapped.norm()
        assert (wrapped - exact).norm() <= 0.02 * exact.norm()
        assert losses[6] < losses[0] - 0.1

    @each_mode
    @pytest.mark.parametrize("cast_afterwards", [False, True])
    def test_bfloat16_weights_have_float32_coordinates(self, mode, cast_afterwards):
        model = zoo(torch.float32 if cast_afterwards else torch.bfloat16)
        optimizer = MODES[mode](model, EVERY_KIND, lr=1e-2)
        if cast_afterwards:
            model.to(torch.bfloat16)
        start = weights_of(optimizer)
        train(model, optimizer, zoo_batches(5), zoo_loss)
        self.assert_stays_wide(optimizer, torch.bfloat16)
        assert all(sub.basis.refreshes == 2 for sub in optimizer.subspaces)
        assert all(not torch.equal(weight, start[name]) for name, weight in optimizer.weights().items())

    def test_modes_stay_close_on_bfloat16_weights_of_every_kind(self):
        """Optimizer mode rounds W to 8 bits (2^-8 = 3.9e-3) at every step, adapter mode at each refresh; seen 8.2e-3."""
        found = []
        for make in MODES.values():
            model = zoo(torch.bfloat16)
            train(model, optimizer := make(model, EVERY_KIND, lr=1e-3), zoo_batches(8), zoo_loss)
            optimizer.detach()
            found.append({name: param.detach().float() for name, param in model.named_parameters()})
        assert gap(*found) <= 2e-2


class TestFastMerges:
    """Of 16-bit weights: z is rounded to the weight's dtype, so that products run in it.

    That moves an entry of S z by a share u of it, u the unit roundoff; for both sides twice, since P z is rounded too. For
    updates of 1e-3 of the weights that is 1e-3 u |w|, and numbers near w are u |w| to 2 u |w| apart: about one entry in a
    thousand is rounded to its other neighbour, by one spacing. The variance of a rounding is 1/12 of a spacing squared, so the
    added error is at most about sqrt(12 / 1000) = 0.11 of the weight's own, and 0.16 for both sides.
    """

    BOUND = 0.16

    @staticmethod
    def maps(dtype):
        draw = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(4, size, 32, generator=draw))[0].to(dtype) for size in (192, 256))
        yield KroneckerMap(left[0], None), (32, 256)
        yield KroneckerMap(None, right[0]), (192, 32)
        yield KroneckerMap(left[0], right[0]), (32, 32)
        yield TwoSidedMap(SelectionMap(torch.arange(0, 192, 2), None, (192, 256)), KroneckerMap(None, right[0])), (96, 32)
        yield BatchedMap(4, None, right), (4 * 192, 32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("which", range(5), ids=["left", "right", "both", "rows x right", "batched"])
    def test_the_error_they_add_is_below_the_weights_own_rounding(self, dtype, which):
        smap, shape = list(self.maps(dtype))[which]
        draw = torch.Generator().manual_seed(1)
        start = (torch.randn(smap.lift(torch.zeros(shape)).shape, generator=draw) / 16).to(dtype)
        exact, fast, total = start.clone(), start.clone(), start.double()
        for step in range(20):
            coords = torch.randn(shape, generator=draw)
            coords *= 1e-3 * start.float().norm() / smap.lift(coords).norm()
            smap.add_lift_(exact, coords)
            smap.add_rounded_lift_(fast, coords)
            total += smap.lift(coords.double())
            if step == 0:
                assert 0 < (fast.double() - exact.double()).norm() <= self.BOUND * (exact.double() - total).norm()
        # each step adds so much, independently of the others, to errors that grow in the same way
        own, both = ((weight.double() - total).norm() for weight in (exact, fast))
        assert abs(both / own - 1) <= self.BOUND

    def test_losses_agree(self):
        """Of a small Llama: they differ by less of what bfloat16 changes in them than merges add to its rounding of weights."""
        found = []
        ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
        for dtype, merge in ((torch.float32, "exact"), (torch.bfloat16, "exact"), (torch.bfloat16, "fast")):
            model = build_llama(LlamaShape(64, 32, 88, 2, 4, 16), seed=0).to(dtype)
            optimizer = lingrad.wrap(model, "power(rank=8, every=8)", lr=5e-3, merge=merge)
            losses = []
            for _ in range(16):
                optimizer.zero_grad()
                logits = model(input_ids=ids).logits[:, :-1].float()  # in bfloat16 the losses themselves are 1/64 apart
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            found.append(torch.tensor(losses))
        wide, exact, fast = found
        assert fast[-1] < fast[0] - 0.5
        assert 0 < (fast - exact).abs().mean() <= self.BOUND * (exact - wide).abs().mean()
