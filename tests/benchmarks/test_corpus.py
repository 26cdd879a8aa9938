"""The text of benchmarks and its batches."""

import pytest
import torch

from benchmarks import corpus
from lingrad.research.corpus import moby_dick

TEXT = corpus.tokenize("Moby-Dick", moby_dick())


def test_the_split_is_by_position():
    joined = bytes(torch.cat((TEXT.train, TEXT.valid)).tolist())
    assert joined == moby_dick().encode()
    assert len(TEXT.valid) == pytest.approx(0.1 * len(joined), abs=1)


def test_batches_depend_on_the_seed_alone():
    size = {"steps": 3, "rows": 2, "length": 5}
    torch.rand(4)
    a, b, c = (list(corpus.training_batches(TEXT, seed=seed, **size)) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    assert a[0].shape == (2, 5)


def test_validation_spans_the_last_tenth():
    batches = corpus.validation_batches(TEXT, rows=4, length=6, batches=3)
    assert [b.shape for b in batches] == [(4, 6)] * 3
    assert torch.equal(batches[0][0], TEXT.valid[:6])
    assert torch.equal(batches[-1][-1], TEXT.valid[-6:])
