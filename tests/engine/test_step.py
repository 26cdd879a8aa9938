"""What a step costs: operations counted, nothing waited for, one call for many parameters; merges now and then; compiled."""

import warnings

import pytest
import torch
from torch import nn

import lingrad
from benchmarks.flops import count
from lingrad import optimizers
from lingrad.errors import SpecError
from lingrad.maps import KroneckerMap, SelectionMap
from lingrad.testing.oracles import assert_dual
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode
from tests.support.watch import NoWaiting

each_side = pytest.mark.parametrize("side", ["left", "right", "both"])


def projection(side, tokens, m, n, r):
    """2 T r (m + n), or with bases on both sides 2 T (n r + m r + r r): the formula of lingrad.adapters.linear."""
    return 2 * tokens * (r * (m + n) + (r * r if side == "both" else 0))


class TestFlops:
    def count(self, mode, side, tokens, m=50, n=40, r=3):
        """Of forward and backward of one layer, off refresh steps."""
        model = nn.Sequential(nn.Linear(n, m, bias=False))
        optimizer = MODES[mode](model, {"*": f"svd(rank={r}, every=9, side={side})"}, "sgd", lr=0.1)
        x = torch.randn(tokens, n, requires_grad=True)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return count(lambda: model(x).square().sum().backward())

    @each_side
    @pytest.mark.parametrize("tokens", [1, 7, 300])
    def test_optimizer_mode(self, side, tokens):
        """Forward and input gradient are the plain layer's; the weight gradient is its projection."""
        m, n, r = 50, 40, 3
        assert self.count("optimizer", side, tokens) == 2 * (2 * tokens * m * n) + projection(side, tokens, m, n, r)

    @each_side
    @pytest.mark.parametrize("tokens", [1, 7, 300])
    def test_adapter_mode(self, side, tokens):
        """Beside that S z acts on tokens and their gradients, or is formed twice, whichever is less."""
        m, n, r = 50, 40, 3
        apply = {"left": r * (m + 2 * n), "right": r * (2 * m + n), "both": 2 * r * r + r * (m + n)}[side]
        lift = {"left": m * n * r, "right": m * n * r, "both": m * r * r + m * n * r}[side]
        extra = min(2 * tokens * apply, 2 * 2 * lift)
        assert extra == (2 * tokens * apply if tokens < 20 else 4 * lift)  # both roads are taken here
        expected = 2 * (2 * tokens * m * n) + projection(side, tokens, m, n, r) + extra
        assert self.count("adapter", side, tokens) == expected

    @each_mode
    def test_of_a_whole_model_with_a_shared_input(self, mode):
        """Every product of a Llama's step; q, k, v and gate, up reduce their input once."""
        counts = {}
        ids = text_batches(1, micro=1, rows=9)[0][0]

        def after_a_step(share):
            model = llama(torch.float32)
            optimizer = MODES[mode](model, "svd(rank=4, every=9, side=right)", "sgd", lr=0.1, share=share)
            text_loss(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            return count(lambda: text_loss(model, ids).backward())

        for share in (None, "input"):
            counts[share] = after_a_step(share)
        saved = 2 * ids.numel() * 32 * 4 * (2 + 1)  # two of q, k, v, one of gate, up, in each of two layers
        assert counts[None] - counts["input"] == 2 * saved

    @each_side
    @pytest.mark.parametrize("shape", [(50, 40), (40, 50), (30, 30), (7, 90)])
    @pytest.mark.parametrize("r", [1, 3, 7])
    def test_the_rule_counts_as_the_counter_does(self, side, shape, r):
        """lifts_cheaper against the products of both roads, for tokens on both sides of the edge."""
        m, n = shape
        smap = KroneckerMap(
            torch.zeros(m, r) if side != "right" else None,
            torch.zeros(n, r) if side != "left" else None,
        )
        coords = smap.project(torch.zeros(m, n))

        def applied(tokens):
            x, g, y = torch.zeros(tokens, n), torch.zeros(tokens, m), torch.zeros(tokens, m)
            reduced, reduced_grad = smap.reduce(x), smap.T.reduce(g)
            forward = count(lambda: smap.inner.add_apply_(y, reduced, coords))
            return forward + count(lambda: smap.T.inner.add_apply_(x, reduced_grad, coords.t()))

        lifted = 2 * count(lambda: smap.add_lift(torch.zeros(m, n), coords))
        answers = [smap.lifts_cheaper(tokens, shape) for tokens in range(1, 120)]
        assert answers == [lifted < applied(tokens) for tokens in range(1, 120)]
        assert len(set(answers)) == 2

    def test_a_map_without_products_of_its_own_forms_its_lift(self):
        assert SelectionMap(torch.tensor([0, 1]), None, (4, 3)).lifts_cheaper(1, (4, 3))
        assert not KroneckerMap(None, None).lifts_cheaper(100, (4, 3))  # the identity has nothing to gain

    def test_coordinates_wider_than_the_weight_are_not_rounded_into_it(self):
        """In bfloat16 a small z would vanish in W + S z; it acts by itself."""
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
        optimizer = lingrad.adapt(model, {"*": "random(rank=8)"}, "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
        with torch.no_grad():
            model[0].weight.fill_(1.0)  # the next number is 1 + 2^-7
            before = model(x)
            sub.coords.fill_(1e-3)
            assert not torch.equal(model(x), before)
            assert torch.equal(model[0].weight + sub.map().lift(sub.coords).to(torch.bfloat16), model[0].weight)


class TestNoWaiting:
    """On a GPU the host runs ahead unless it asks for a number; off refresh steps nothing does."""

    @each_mode
    @pytest.mark.parametrize("base", [name for name in optimizers.names() if name not in ("adamw8bit", "adafactor")])
    @pytest.mark.parametrize("text", ["svd(rank=4, every=3)", "power(rank=4, every=3)", "random(rank=4, every=3)"])
    def test_off_refresh_steps(self, mode, text, base):
        model = llama(torch.float32)
        options = {"foreach": False} if base == "rmsprop" else {}
        optimizer = MODES[mode](model, text, base, lr=1e-3, weight_decay=0.1, **options)
        for i, micro_batches in enumerate(text_batches(3)):
            optimizer.zero_grad()
            if i == 0:
                for batch in micro_batches:
                    text_loss(model, batch).backward()
                optimizer.step()
                continue
            if i == 2 and not text.startswith("svd"):
                break  # the step that draws or learns the next basis
            with NoWaiting():
                for batch in micro_batches:
                    text_loss(model, batch).backward()
                optimizer.step()

    def test_the_watch_sees_a_refresh(self):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-3)
        text_loss(model, text_batches(1, micro=1)[0][0]).backward()
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            optimizer.step()

    @each_mode
    def test_a_sketch_is_gathered_without_waiting(self, mode):
        """Also at a refresh the backward runs through; the step then asks what it has found."""
        model = llama(torch.float32)
        optimizer = MODES[mode](model, "power(rank=4, every=1)", lr=1e-3)
        for micro_batches in text_batches(3):
            optimizer.zero_grad()
            with NoWaiting():
                for batch in micro_batches:
                    text_loss(model, batch).backward()
            optimizer.step()


class TestMergeEvery:
    @pytest.mark.thinned(3)
    @pytest.mark.parametrize("text", ["svd(rank=4, every=5)", "power(rank=4, every=5)", "random(rank=4, every=5, side=both)"])
    @pytest.mark.parametrize("merge_every", [1, 2, 3, 100])
    @pytest.mark.parametrize("layerwise", [False, True])
    def test_the_trajectory_is_the_same(self, text, merge_every, layerwise):
        weights = []
        for options in ({}, {"merge_every": merge_every}):
            model = llama()
            optimizer = lingrad.adapt(model, text, lr=1e-2, weight_decay=0.1, layerwise=layerwise, **options)
            train(model, optimizer, text_batches(12, micro=1))
            weights.append(optimizer.weights())
        assert gap(*weights) <= 1e-12

    def test_of_every_kind_of_weight(self):
        assert_dual("svd(rank=3, every=5)", merge_every=None)
        weights = []
        for options in ({}, {"merge_every": 2}):
            model = zoo()
            optimizer = lingrad.adapt(model, {"*": "svd(rank=1, every=5)"}, lr=1e-2, **options)
            train(model, optimizer, zoo_batches(8), zoo_loss)
            weights.append(optimizer.weights())
        assert gap(*weights) <= 1e-12

    def test_coordinates_are_zero_after_a_merge_only(self):
        model = llama()
        optimizer = lingrad.adapt(model, "random(rank=4, every=100)", lr=1e-2, merge_every=3)
        zero = []
        for batch in text_batches(7, micro=1):
            train(model, optimizer, [batch], schedule=False)
            zero.append(all(not sub.coords.any() for sub in optimizer.subspaces))
        assert zero == [False, False, True, False, False, True, False]
        optimizer.switch("optimizer")
        train(model, optimizer, text_batches(1), schedule=False)
        optimizer.switch("adapter")
        train(model, optimizer, text_batches(1), schedule=False)
        assert all(not sub.coords.any() for sub in optimizer.subspaces)  # the ninth

    def test_it_resumes_to_the_bit(self):
        batches, runs = text_batches(8), []
        for split in (False, True):
            model = llama()
            optimizer = lingrad.adapt(model, "svd(rank=4, every=5)", lr=1e-2, merge_every=3)
            train(model, optimizer, batches[:4], schedule=False)
            if split:
                saved, weights = optimizer.state_dict(), model.state_dict()
                model = llama()
                optimizer = lingrad.adapt(model, "svd(rank=4, every=5)", lr=1e-2, merge_every=3)
                model.load_state_dict(weights)
                optimizer.load_state_dict(saved)
            train(model, optimizer, batches[4:], schedule=False)
            runs.append(optimizer.weights())
        assert gap(*runs) == 0

    @pytest.mark.parametrize("value", [0, -1, 2.0, True, "2"])
    def test_what_is_no_number_of_steps(self, value):
        with pytest.raises(SpecError, match="merge_every must be a number of steps, 1 or more, or None"):
            lingrad.adapt(llama(), "svd(rank=4)", lr=1e-2, merge_every=value)

    def test_optimizer_mode_has_no_use_for_it(self):
        with pytest.raises(SpecError, match="wrap.*merge_every|merge_every is for adapter mode|takes no option 'merge_every'"):
            lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2, merge_every=2)

    @pytest.mark.parametrize("k", [1, 4])
    @pytest.mark.parametrize(("tokens", "cheaper"), [(8, True), (20, False)])
    def test_from_how_few_tokens_it_is_cheaper_than_optimizer_mode(self, k, tokens, cheaper):
        """Through the coordinates, 2 T r (2 m + n) a step and a merge in k steps; otherwise k merges, 2 m n r each."""
        m, n, r = 50, 40, 3
        counts = []
        for make, options in ((lingrad.wrap, {}), (lingrad.adapt, {"merge_every": k})):
            model = nn.Sequential(nn.Linear(n, m, bias=False))
            optimizer = make(model, {"*": f"random(rank={r}, every=100, side=right)"}, "sgd", lr=0.1, **options)
            x = torch.randn(tokens, n, requires_grad=True)

            def steps(model=model, optimizer=optimizer, x=x):
                for _ in range(k):
                    optimizer.zero_grad()
                    model(x).square().sum().backward()
                    optimizer.step()

            counts.append(count(steps))
        merging, applying = 2 * m * n * r, 2 * tokens * r * (2 * m + n)
        assert counts[1] - counts[0] == k * applying - (k - 1) * merging
        assert (counts[1] < counts[0]) == (cheaper and k > 1)
        assert (tokens < (1 - 1 / k) * m * n / (2 * m + n)) == (cheaper and k > 1)  # as docs/performance.md says


class TestForwardOfAdapterMode:
    def test_a_forward_that_somebody_replaced_is_called(self):
        """As accelerate does; then S z is added to what that forward gives."""
        weights = []
        for mode in MODES:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 9)).double()
            plain = model[0].forward
            model[0].forward = lambda x, plain=plain: plain(2 * x)
            mine = model[0].forward
            optimizer = MODES[mode](model, {"*": "random(rank=3, every=2)"}, "sgd", lr=0.1)
            for seed in range(3):
                optimizer.zero_grad()
                x = torch.randn(50, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                model(x).square().sum().backward()
                optimizer.step()
            weights.append(optimizer.weights())
            optimizer.detach()
            assert model[0].forward is mine
        assert gap(*weights) > 1e-3  # x in the forward, 2 x in the gradient: what is added knows nothing of the factor

    def test_gradients_pass_a_replaced_forward(self):
        """Through S z too, to the layer below."""
        weights = []
        for replaced in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7)).double()
            for linear in (model[0], model[2]) if replaced else ():
                linear.forward = lambda x, plain=linear.forward: plain(x)
            optimizer = lingrad.adapt(model, {"*": "svd(rank=3, every=3)"}, "sgd", lr=0.1)
            for seed in range(5):
                optimizer.zero_grad()
                x = torch.randn(50, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                model(x).square().mean().backward()
                optimizer.step()
            weights.append(optimizer.weights())
        assert gap(*weights) <= 1e-12

    @each_mode
    def test_a_forward_replaced_afterwards_outlives_the_optimizer(self, mode):
        model = nn.Sequential(nn.Linear(12, 9)).double()
        optimizer = MODES[mode](model, {"*": "random(rank=3)"}, "sgd", lr=0.1)
        ours = model[0].forward
        theirs = model[0].forward = lambda x: ours(x)
        x = torch.randn(5, 12, dtype=torch.float64)
        for other in ("adapter", "optimizer", mode):
            optimizer.zero_grad()
            model(x).sum().backward()
            before = {name: weight.clone() for name, weight in optimizer.weights().items()}
            optimizer.step()
            assert gap(before, optimizer.weights()) > 1e-3
            optimizer.switch(other)
        optimizer.detach()
        assert model[0].forward is theirs
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))

    @each_mode
    @pytest.mark.parametrize("how", ["layerwise", "frozen"])
    def test_nobody_is_told_of_gradients_that_should_be_missing(self, mode, how):
        model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 7)).double()
        optimizer = MODES[mode](model, {"*": "random(rank=3)"}, "sgd", lr=0.1, layerwise=how == "layerwise")
        model[1].forward = lambda x, ours=model[1].forward: ours(x)
        if how == "frozen":
            model[1].requires_grad_(False)
        model(torch.randn(5, 12, dtype=torch.float64)).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            optimizer.step()

    @each_mode
    @pytest.mark.parametrize("kind", ["reads", "loses"])
    def test_a_forward_that_lost_ours_trains_what_it_reads_and_is_told_of_else(self, mode, kind):
        """As who restores the forward of before: it reads the weight, W + S z. A copy of the weight would stay as it is."""
        found = []
        for lost in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 9)).double()
            optimizer = MODES[mode](model, {"*": "random(rank=3, every=2)"}, "sgd", lr=0.1)
            copied = model[0].weight.detach().clone()
            if lost:
                model[0].forward = lambda x, m=model[0], w=copied: nn.functional.linear(
                    x, m.weight if kind == "reads" else w, m.bias
                )
            for i in range(5):
                optimizer.zero_grad()
                x = torch.randn(5, 12, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                model(x).square().sum().backward()
                if lost and kind == "loses" and i == 0:
                    with pytest.warns(RuntimeWarning, match="replaced after lingrad had wrapped it"):
                        optimizer.step()
                else:
                    optimizer.step()
            found.append(optimizer.weights()["0.weight"])
        if kind == "reads":
            torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)  # float64, sums in another order

    @each_mode
    def test_the_class_s_own_forward_comes_back(self, mode):
        model = nn.Sequential(nn.Linear(12, 9))
        optimizer = MODES[mode](model, {"*": "random(rank=3)"}, "sgd", lr=0.1)
        assert "forward" in vars(model[0])
        optimizer.detach()
        assert "forward" not in vars(model[0])

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("tokens", [3, 200])
    def test_gradients_of_input_and_bias(self, bias, tokens):
        """On both roads, against plain autograd with W + S z."""
        model = nn.Sequential(nn.Linear(12, 9, bias=bias)).double()
        optimizer = lingrad.adapt(model, {"*": "random(rank=3)"}, "sgd", lr=0.1)
        (sub,) = optimizer.subspaces
        with torch.no_grad():
            sub.coords.copy_(torch.randn(sub.coords.shape, dtype=torch.float64))
        x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
        weight = optimizer.weights()["0.weight"].detach()
        (nn.functional.linear(x, weight, model[0].bias).sigmoid()).sum().backward()
        expected = [p.grad.clone() for p in (x, model[0].bias) if p is not None]
        x.grad = None
        optimizer.zero_grad()
        model(x).sigmoid().sum().backward()
        for found, wanted in zip([p.grad for p in (x, model[0].bias) if p is not None], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_compiled_step_refuses_a_plain_learning_rate():
    optimizer = lingrad.wrap(llama(), "svd(rank=4)", lr=1e-3)
    with pytest.raises(SpecError, match="the learning rate of group 'coords' is a number.*lr=torch.tensor"):
        optimizer.compile_step()


def test_a_compiled_step_refuses_a_kernel_that_torch_cannot_compile():
    pytest.importorskip("bitsandbytes")
    optimizer = lingrad.wrap(llama(torch.float32), "svd(rank=4)", "adamw8bit", lr=torch.tensor(1e-3))
    with pytest.raises(SpecError, match="adamw8bit is a kernel of bitsandbytes, which torch cannot compile"):
        optimizer.compile_step()


@pytest.mark.slow
class TestCompiledStep:
    """Through the tracer and autograd's partitioner, without a C++ compiler."""

    @each_mode
    @pytest.mark.parametrize("base", ["adamw", "sgd"])
    def test_it_steps_alike_and_is_compiled_once(self, mode, base):
        from torch._dynamo.utils import counters

        weights = []
        for compiled in (False, True):
            torch._dynamo.reset()
            counters.clear()
            model = llama(torch.float32)
            options = {"momentum": 0.9} if base == "sgd" else {}
            lr = torch.tensor(1e-2)
            optimizer = MODES[mode](model, "svd(rank=4, every=3)", base, lr=lr, weight_decay=0.1, **options)
            if compiled:
                optimizer.compile_step(backend="aot_eager")
            graphs = []
            for i, micro_batches in enumerate(text_batches(8)):
                train(model, optimizer, [micro_batches], schedule=False)
                for group in optimizer.param_groups:
                    group["lr"].fill_(1e-2 / (2 + i))
                graphs.append(counters["stats"]["unique_graphs"])
            weights.append(optimizer.weights())
            assert (graphs[-1] > 0) == compiled
            assert graphs[2] == graphs[-1]  # schedules and refreshes compile nothing anew
        # the traced step divides and multiplies in another order
        assert gap(*weights) <= 1e-5
