"""What a run says of itself: the ledger of its merges, and checkpoints that are complete by themselves."""

import copy
import io

import pytest
import torch
from torch import nn

import lingrad
from lingrad import errors
from lingrad.maps.factors import Factors, compress, stack
from lingrad.weights.dense import DenseWeight
from tests.support.cases import SIDED, UNSIDED
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES

pytestmark = [pytest.mark.thinned(3), pytest.mark.rare(3)]

SPECS = [
    text.format(side=side).replace("every=7", "every=3").replace("every=5", "every=3")
    for text in SIDED
    for side in ("short", "both")
]
SPECS += [text.replace("every=7", "every=3") for text in UNSIDED]


def start_of(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_known(optimizer, start):
    """W == kept W_0 + left @ right for every transformed weight, to the rounding of float64."""
    weights, changes = optimizer.weights(), optimizer.changes()
    assert changes.keys() == {sub.name for sub in optimizer.subspaces}
    for name, change in changes.items():
        assert change.factors is not None, name
        expected = change.decay * change.layout.matrix(start[name]) + change.factors.dense()
        found = change.layout.matrix(weights[name])
        assert (found - expected).norm() <= 1e-12 * found.norm(), name
    return changes


class TestLedger:
    @pytest.mark.parametrize("where", ["merge", "ledger"])
    @pytest.mark.parametrize("spec", ["svd(rank=2, every=3)", "power(rank=2, every=3)", "random(rank=2, every=3, kind=rows)"])
    @pytest.mark.parametrize(
        ("mode", "options"), [("optimizer", {}), ("adapter", {}), ("adapter", {"merge_every": 2})], ids=str
    )
    def test_a_merge_that_fails_and_is_repeated_counts_once(self, mode, options, spec, where, monkeypatch):
        """As where memory runs out: the step is made again by a loop that goes on."""
        model = zoo()
        start = start_of(model)
        optimizer = MODES[mode](model, {"*": spec}, "sgd", lr=0.1, ledger=True, **options)
        owner, name = {"merge": (DenseWeight, "add_"), "ledger": (torch, "zeros_like")}[where]
        real, calls, failed = getattr(owner, name), 0, 0

        def failing(*args, **kwargs):
            nonlocal calls, failed
            calls += 1
            if calls % 5 == 3:
                failed += 1
                raise torch.OutOfMemoryError("out of memory")
            return real(*args, **kwargs)

        for micro_batches in zoo_batches(8):
            optimizer.zero_grad()
            for batch in micro_batches:
                zoo_loss(model, batch).backward()
            monkeypatch.setattr(owner, name, failing)
            for _ in range(40):
                try:
                    optimizer.step()
                    break
                except torch.OutOfMemoryError:
                    continue
                except errors.ModeError:  # it failed after the step, in a redraw: the gradient belongs to the old basis
                    break
            monkeypatch.setattr(owner, name, real)
        assert failed
        assert_known(optimizer, start)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("spec", SPECS)
    def test_it_adds_up_to_what_was_trained(self, spec, mode):
        """With decay, micro-batches, refreshes and every kind of weight; the sum over merges is the ledger's."""
        model = zoo()
        start = start_of(model)
        optimizer = MODES[mode](model, {"*": spec}, "sgd", lr=0.1, weight_decay=0.3, ledger=True)
        train(model, optimizer, zoo_batches(8), zoo_loss)
        changes = assert_known(optimizer, start)
        assert all(change.decay < 1 for change in changes.values())

    @pytest.mark.parametrize("spec", ["svd(rank=4, every=3)", "random(rank=4, every=3, side=left)", "power(rank=4, every=3)"])
    def test_it_follows_switches_and_resumes(self, spec):
        def run(model):
            return lingrad.wrap(model, spec, lr=1e-2, weight_decay=0.1, ledger=True)

        model = llama()
        start = start_of(model)
        optimizer = run(model)
        batches = text_batches(10)
        train(model, optimizer, batches[:4], switches=(1,), schedule=False)
        assert optimizer.mode == "adapter"
        optimizer.switch("optimizer")
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        train(model, optimizer, batches[4:], schedule=False)
        expected = assert_known(optimizer, start)

        saved.seek(0)
        loaded = torch.load(saved, weights_only=True)
        resumed = llama()
        again = run(resumed)
        resumed.load_state_dict(loaded["model"])
        again.load_state_dict(loaded["optimizer"])
        train(resumed, again, batches[4:], schedule=False)
        for name, change in again.changes().items():
            assert torch.equal(change.factors.left, expected[name].factors.left)
            assert torch.equal(change.factors.right, expected[name].factors.right)
            assert change.decay == expected[name].decay

    def test_shared_bases(self):
        model = llama()
        start = start_of(model)
        optimizer = lingrad.adapt(model, "svd(rank=4, every=3)", lr=1e-2, share="input", ledger=True)
        train(model, optimizer, text_batches(8))
        assert_known(optimizer, start)

    def test_a_random_basis_is_kept_as_its_seed(self):
        model = llama()
        optimizer = lingrad.adapt(model, "random(rank=4, every=2)", lr=1e-2, ledger=True)
        train(model, optimizer, text_batches(7))
        entries = optimizer.state_dict()["state"][0]
        assert "subspace.ledger.0.state.seed" in entries
        assert not [key for key in entries if key.endswith((".left", ".right"))]

    def test_the_rank_is_that_of_the_bases_used(self):
        model = llama()
        optimizer = lingrad.adapt(model, "svd(rank=4, every=3)", lr=1e-2, ledger=True)
        train(model, optimizer, text_batches(8))
        assert {change.factors.rank for change in optimizer.changes().values()} == {12}

    @pytest.mark.parametrize("mode", MODES)
    def test_what_it_holds_is_told(self, mode):
        """In optimizer mode one more set of coordinates on the device; in adapter mode none before the first merge."""
        model = llama()
        optimizer = MODES[mode](model, "svd(rank=4, every=9)", lr=1e-2, ledger=True)
        train(model, optimizer, text_batches(3), schedule=False)
        held = sum(t.untyped_storage().nbytes() for t, kind in optimizer.held() if kind == "coords")
        count = sum(sub.coords.numel() for sub in optimizer.subspaces)
        released = 8 * len(optimizer.subspaces) if mode == "optimizer" else 0  # one zero each
        assert held == 8 * count + released

    @pytest.mark.parametrize("rounding", ["nearest", "compensated"])
    def test_every_decay_counts_however_weights_round(self, rounding):
        """Also of steps in which nothing of the basis in use was merged yet: the first one, and each refresh."""
        model = llama(torch.bfloat16)
        optimizer = lingrad.wrap(
            model, "svd(rank=4, every=2)", lr=1e-2, weight_decay=0.1, ledger=True, rounding=rounding, merge="exact"
        )
        train(model, optimizer, text_batches(5), schedule=False)
        expected = pytest.approx((1 - 1e-3) ** 5, rel=1e-12)
        assert all(change.decay == expected for change in optimizer.changes().values())

    def test_decay_that_leaves_nothing(self):
        model = llama()
        start = start_of(model)
        optimizer = lingrad.wrap(model, "svd(rank=4)", "sgd", lr=0.5, weight_decay=2.0, ledger=True)
        train(model, optimizer, text_batches(3), schedule=False)
        assert_known(optimizer, start)

    def test_without_one_a_change_is_known_until_something_is_merged(self):
        model = llama()
        start = start_of(model)
        optimizer = lingrad.adapt(model, "svd(rank=4, every=3)", lr=1e-2)
        train(model, optimizer, text_batches(3), schedule=False)
        assert_known(optimizer, start)
        train(model, optimizer, text_batches(1), schedule=False)
        with pytest.raises(errors.ModeError, match=r"was merged into.*ledger=True"):
            optimizer.changes()

    def test_without_one_decay_hides_it(self):
        model = llama()
        optimizer = lingrad.adapt(model, "svd(rank=4)", lr=1e-2, weight_decay=0.1)
        train(model, optimizer, text_batches(1), schedule=False)
        with pytest.raises(errors.ModeError, match=r"decays, and what was merged was not recorded"):
            optimizer.changes()

    def test_a_checkpoint_that_lacks_a_part(self):
        model = llama()
        optimizer = lingrad.adapt(model, "svd(rank=4, every=2)", lr=1e-2, ledger=True)
        train(model, optimizer, text_batches(5), schedule=False)
        state = optimizer.state_dict()
        del state["state"][0]["subspace.ledger.0.left"]
        with pytest.raises(errors.CheckpointError, match=r"no factors of merge 0 of model\.layers\.0"):
            optimizer.load_state_dict(state)


class TestSelfContained:
    """Adapter mode whose model.state_dict() is the plain model's, as the Trainer and accelerate save it."""

    SPEC = "svd(rank=4, every=4)"

    def run(self, model, rules=None, **options):
        return lingrad.adapt(model, rules or self.SPEC, lr=1e-2, weight_decay=0.1, self_contained=True, **options)

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        "rules", ["svd(rank=4, every=4)", {"*embed*": "svd(rank=4, every=4)", "*mlp*": "random(rank=4, every=3)"}]
    )
    def test_the_model_saves_as_the_plain_one(self, rules, tied):
        model = llama(tie_word_embeddings=tied)
        plain = {key: value.shape for key, value in model.state_dict().items()}
        optimizer = self.run(model, rules)
        train(model, optimizer, text_batches(6), schedule=False)
        assert any(sub.coords.any() for sub in optimizer.subspaces)
        saved = model.state_dict()
        assert {key: value.shape for key, value in saved.items()} == plain
        fresh = llama(tie_word_embeddings=tied)
        fresh.load_state_dict(saved)
        ids = text_batches(1)[0][0]
        torch.testing.assert_close(fresh(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-12)
        if tied:
            assert saved["lm_head.weight"].data_ptr() == saved["model.embed_tokens.weight"].data_ptr()

    @pytest.mark.parametrize("build", [llama, zoo])
    @pytest.mark.parametrize("steps", [2, 4, 6])
    def test_it_resumes_bit_for_bit(self, build, steps):
        """Before the first merge, right after one, and between two."""
        batches, loss = (zoo_batches(9), zoo_loss) if build is zoo else (text_batches(9), text_loss)
        rules = {"*": self.SPEC} if build is zoo else self.SPEC
        model = build(torch.float32)
        optimizer = self.run(model, rules)
        train(model, optimizer, batches[:steps], loss, schedule=False)
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        train(model, optimizer, batches[steps:], loss, schedule=False)

        saved.seek(0)
        loaded = torch.load(saved, weights_only=True)
        resumed = build(torch.float32)
        resumed.load_state_dict(loaded["model"])  # as the Trainer does: the model before there is an optimizer
        again = self.run(resumed, rules)
        again.load_state_dict(loaded["optimizer"])
        train(resumed, again, batches[steps:], loss, schedule=False)
        expected, found = optimizer.weights(), again.weights()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name

    def test_a_plain_model_that_is_loaded_replaces_all_of_it(self):
        model = llama()
        optimizer = self.run(model)
        train(model, optimizer, text_batches(3), schedule=False)
        model.load_state_dict(llama().state_dict())
        assert gap(optimizer.weights(), dict(llama().named_parameters())) == 0.0

    @pytest.mark.parametrize("steps", [3, 6])
    def test_then_its_change_is_not_known(self, steps):
        """Before and after a merge; with the optimizer's state of the same moment it is known again."""
        model = llama()
        optimizer = self.run(model, ledger=True)
        model.load_state_dict(llama().state_dict())  # nothing had changed
        assert all(change.factors is None for change in optimizer.changes().values())
        train(model, optimizer, text_batches(steps), schedule=False)
        saved, state = model.state_dict(), optimizer.state_dict()
        saved, state = copy.deepcopy(saved), copy.deepcopy(state)
        expected = {name: change.factors.dense() for name, change in optimizer.changes().items()}
        train(model, optimizer, text_batches(2, seed=5), schedule=False)
        model.load_state_dict(saved)
        with pytest.raises(errors.ModeError, match=r"was loaded into the model after it had changed.*optimizer\.pt"):
            optimizer.changes()
        optimizer.load_state_dict(state)
        assert gap({name: change.factors.dense() for name, change in optimizer.changes().items()}, expected) == 0.0

    def test_detaching_gives_the_model_back(self):
        model = llama()
        hooks = {name: len(module._state_dict_hooks) for name, module in model.named_modules()}
        optimizer = self.run(model)
        train(model, optimizer, text_batches(3), schedule=False)
        saved = model.state_dict()
        optimizer.detach()
        assert {name: len(module._state_dict_hooks) for name, module in model.named_modules()} == hooks
        assert gap(model.state_dict(), saved) <= 1e-15

    def test_loading_its_own_state_copies_nothing(self):
        """As accelerate does when it is handed an optimizer; a copy of all weights would be a peak."""
        model = llama()
        optimizer = self.run(model)
        state = optimizer.state_dict()
        stored = [value for entries in state["state"].values() for key, value in entries.items() if ".stored.weight" in key]
        assert stored
        assert {t.data_ptr() for t in stored} <= {p.data_ptr() for p in model.parameters()}
        optimizer.load_state_dict(state)

    def test_another_kind_of_run_is_refused(self):
        model = llama()
        state = self.run(model).state_dict()
        other = lingrad.adapt(llama(), self.SPEC, lr=1e-2, self_contained=False)
        with pytest.raises(errors.CheckpointError, match="self_contained True, this run has False"):
            other.load_state_dict(state)


class TestFactors:
    def test_stack_and_compress(self):
        torch.manual_seed(0)
        parts = [Factors(torch.randn(9, 2).double(), torch.randn(2, 7).double()) for _ in range(3)]
        whole = stack(parts)
        dense = sum(part.dense() for part in parts)
        torch.testing.assert_close(whole.dense(), dense, rtol=0, atol=1e-14)
        for rank in (6, 4, 1):
            small, dropped = compress(whole, rank=rank)
            values = torch.linalg.svdvals(dense)
            assert small.rank == rank
            assert dropped == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-12)
            far = float((small.dense() - dense).norm() / dense.norm())
            assert far == pytest.approx(dropped, abs=1e-12)

    def test_what_is_of_lower_rank_is_found_so(self):
        torch.manual_seed(0)
        part = Factors(torch.randn(9, 2).double(), torch.randn(2, 7).double())
        small, dropped = compress(stack([part, part, part]))
        assert small.rank == 2
        assert dropped <= 1e-14

    def test_zero(self):
        small, dropped = compress(Factors(torch.zeros(5, 3), torch.zeros(3, 4)))
        assert (small.rank, dropped) == (1, 0.0)
        assert not small.dense().any()

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(errors.ShapeError, match="have no product"):
            Factors(torch.zeros(5, 3), torch.zeros(2, 4))
        with pytest.raises(errors.ShapeError, match="expected changes of one shape, found"):
            stack([Factors(torch.zeros(5, 3), torch.zeros(3, 4)), Factors(torch.zeros(5, 3), torch.zeros(3, 5))])


def test_layers_that_are_copied_after_training_save_as_plain_ones():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = lingrad.adapt(model, "svd(rank=2)", lr=0.1, self_contained=True)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
