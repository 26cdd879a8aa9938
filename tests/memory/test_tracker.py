"""The tracker: labels that sum to the peak, and nothing left behind."""

import threading

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

import lingrad
from lingrad import memory
from lingrad.errors import MemoryModelError


class TestTracker:
    def trained(self, optimizer="adamw"):
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(self, model, optimizer):
        model(torch.randn(16, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def test_an_ordinary_loop(self):
        model, optimizer = self.trained()
        with memory.track(model, optimizer) as tracked:
            for _ in range(3):
                self.step(model, optimizer)
        report = tracked.report()
        weights = sum(p.numel() for p in model.parameters()) * 4
        assert report.source == "tracked"
        assert report.device == "cpu"
        assert report.steady_breakdown["weight"] == weights
        assert report.steady_breakdown["gradient"] == weights
        assert report.steady_breakdown["moments"] == 2 * weights + 4 * 4  # four step counters
        assert sum(report.breakdown.values()) == report.peak
        assert set(report.by_phase) == {"forward", "backward", "step"}

    def test_a_run_of_lingrad(self):
        model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 8))
        optimizer = lingrad.wrap(model, {"0": "svd(rank=4)"}, "adamw", lr=1e-3)
        with memory.track(model, optimizer) as tracked:
            for _ in range(2):
                self.step(model, optimizer)
        steady = tracked.report().steady_breakdown
        assert steady["coords"] == 4
        assert steady["coords gradient"] == 4 * 128 * 4
        assert steady["basis"] == 64 * 4 * 4
        assert steady["weight"] == 4 * (64 * 128 + 128 * 8 + 8)

    def test_it_changes_no_number(self):
        weights = []
        for tracked in (False, True):
            torch.manual_seed(0)
            model, optimizer = self.trained()
            if tracked:
                with memory.track(model, optimizer):
                    self.step(model, optimizer)
            else:
                self.step(model, optimizer)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(*weights)

    @pytest.mark.parametrize("fails", ["nowhere", "forward", "backward", "step"])
    def test_it_leaves_nothing_behind(self, fails):
        model, optimizer = self.trained()
        before = (len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks))

        def failing(*_):
            raise ValueError("on purpose")

        handles = []
        if fails == "forward":
            handles.append(model[1].register_forward_hook(failing))
        elif fails == "backward":
            handles.append(model[1].register_full_backward_hook(failing))
        elif fails == "step":
            handles.append(optimizer.register_step_pre_hook(failing))
        tracked = memory.track(model, optimizer)
        if fails == "nowhere":
            with tracked:
                self.step(model, optimizer)
        else:
            with pytest.raises(ValueError, match="on purpose"), tracked:
                self.step(model, optimizer)
        for handle in handles:
            handle.remove()
        assert (len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)) == before
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        count = len(tracked.log.during)
        optimizer.zero_grad()
        self.step(model, optimizer)
        assert len(tracked.log.during) == count
        assert tracked.report().peak > 0

    def test_storages_that_grow_and_views(self):
        with memory.track(device="cpu") as tracked:
            t = torch.zeros(100)
            view = t[10:20]
            t.untyped_storage().resize_(4000)
            t.add_(0)
            del t
            at_first = tracked.report().peak
            del view
        assert at_first == 4000
        assert tracked.report().steady == 0

    def test_sparse_gradients_and_other_threads(self):
        embed = nn.Embedding(50, 8, sparse=True)
        optimizer = torch.optim.SparseAdam(embed.parameters())
        with memory.track(embed, optimizer) as tracked:
            embed(torch.tensor([1, 2, 3])).sum().backward()
            optimizer.step()
            thread = threading.Thread(target=lambda: torch.zeros(10_000))
            thread.start()
            thread.join()
        report = tracked.report()
        assert report.steady_breakdown["gradient"] == 3 * 8 * 4 + 3 * 8
        assert report.peak < 10_000

    def test_recomputation_is_told_from_the_forward(self):
        block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        with memory.track(block) as tracked:
            checkpoint(block, torch.randn(32, 64, requires_grad=True), use_reentrant=False).sum().backward()
        report = tracked.report()
        assert "recompute" in report.by_phase
        remade = [s for s in tracked.log.storages if s.phase == "recompute"]
        assert max(s.nbytes for s in remade) == 32 * 256 * 4  # the hidden layer
        assert {s.category for s in remade} == {"activations"}

    def test_a_meta_run_is_not_tracked_as_if_it_took_memory(self):
        with memory.track(nn.Linear(4, 4, device="meta")) as tracked:
            pass
        with pytest.raises(MemoryModelError, match="takes no memory; use lingrad.memory.simulate"):
            tracked.report()


def test_frozen_parameters_are_told_apart_also_where_an_optimizer_holds_them():
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8, bias=False))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    with memory.track(model, optimizer) as tracked:
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    steady = tracked.report().steady_breakdown
    assert (steady["frozen"], steady["weight"]) == (4 * 800, 4 * 64)


def test_a_tracker_is_used_once():
    tracked = memory.track(device="cpu")
    with tracked:
        pass
    with pytest.raises(lingrad.errors.ModeError, match="a tracker can be entered once"), tracked:
        pass


def test_coordinates_are_known_without_the_optimizer():
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    lingrad.wrap(model, {"*": "svd(rank=4)"}, "sgd", lr=0.1)
    with memory.track(model) as tracked:
        model(torch.randn(3, 16)).sum().backward()
    assert tracked.report().steady_breakdown["coords gradient"] == 4 * 16 * 4
