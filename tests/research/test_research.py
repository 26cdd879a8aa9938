"""The packaged text, the bytes that a run holds, and the models it trains."""

import hashlib
import math

import pytest
import torch

import lingrad
from lingrad.errors import DataError
from lingrad.models import LlamaShape, build_llama, next_token_loss
from lingrad.research import accounting, corpus
from tests.support.models import llama, text_batches, text_loss, train

TINY = LlamaShape(hidden=16, intermediate=24, layers=1, heads=2, length=8)


class TestCorpus:
    def test_the_text_is_the_one_its_notice_names(self):
        text = corpus.moby_dick()
        assert text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
        raw = text.encode()
        assert len(raw) == 1_204_997
        digest = hashlib.sha256(raw).hexdigest()
        notice = (corpus.files("lingrad.research") / "data" / "NOTICE.md").read_text()
        assert digest in notice
        assert (digest[:8], digest[-4:]) == ("fe282a57", "7240")

    @pytest.mark.parametrize("damage", [b"not xz", None])
    def test_a_damaged_text_is_noticed(self, monkeypatch, damage):
        import lzma

        packed = damage or lzma.compress(b"another book")

        class Folder:
            def __truediv__(self, _):
                return self

            def read_bytes(self):
                return packed

        monkeypatch.setattr(corpus, "files", lambda _: Folder())
        with pytest.raises(DataError, match="moby-dick.txt.xz is"):
            corpus.moby_dick()


class TestAccounting:
    def test_state_bytes_are_moments_and_bases(self):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
        train(model, optimizer, text_batches(1))
        coords = sum(s.coords.numel() for s in optimizer.subspaces)
        bases = sum(t.numel() for s in optimizer.subspaces for t in s.map().tensors)
        full = sum(p.numel() for g in optimizer.param_groups[1:] for p in g["params"])
        steps = len([p for g in optimizer.param_groups for p in g["params"]])  # Adam's step counters, one float each
        assert accounting.state_bytes(optimizer) == 4 * (2 * coords + bases + 2 * full + steps)

    @pytest.mark.parametrize(("spec", "kept"), [("random(rank=4)", True), ("random(rank=4, store=false)", False)])
    def test_state_bytes_of_a_random_basis(self, spec, kept):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, spec, "sgd", lr=1e-2)
        train(model, optimizer, text_batches(1))
        expected = sum(
            4 * math.prod(s) for sub in optimizer.subspaces for s in sub.basis.transform.basis_shapes(sub.basis.shape) if s
        )
        assert accounting.state_bytes(optimizer) == expected
        assert bool(expected) == kept

    def test_gradient_bytes_off_and_on_a_refresh(self):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4, every=2)", lr=1e-2)
        full = sum(p.numel() for g in optimizer.param_groups[1:] for p in g["params"])
        coords = sum(s.coords.numel() for s in optimizer.subspaces)
        seen = []
        for batch in text_batches(2, micro=1, rows=8):
            optimizer.zero_grad()
            text_loss(model, batch[0]).backward()
            seen.append(accounting.gradient_bytes(model, optimizer))
            optimizer.step()
        matrices = sum(math.prod(s.basis.shape) for s in optimizer.subspaces)  # 96 tokens are more than the matrices hold
        assert seen == [4 * (full + coords + matrices), 4 * (full + coords)]

    def test_models_are_seeded_apart_from_the_global_generator(self):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        a, b = (build_llama(TINY, seed=5, dtype=dtype) for dtype in (torch.float32, torch.float64))
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(x.double(), y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

    def test_float64_models_compute_in_float64(self):
        """transformers' own RMSNorm and loss round to float32 inside; ours must not."""
        model = build_llama(TINY, seed=0, dtype=torch.float64)
        ids = torch.arange(8)[None]
        loss = next_token_loss(model, ids)
        with torch.no_grad():
            model.model.embed_tokens.weight[3, 2] += 1e-13
        moved = next_token_loss(model, ids)
        assert loss.dtype == torch.float64
        assert 0 < abs(float((moved - loss).detach())) < 1e-12
