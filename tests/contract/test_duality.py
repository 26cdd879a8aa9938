"""The theorem (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3): for a linear S and an optimizer that reads
only its gradients, W <- W + S opt(S^T G) and training z in W = W0 + S z give the same W at every step.

Tolerance: 1e-12 relative in float64. The modes round differently (W + S z is summed at every step or at each refresh), about
1e-16 a step, and a basis refreshed from a gradient amplifies it by the inverse of its singular gaps. `Case.tolerance` says
where it must be looser, and why.
"""

import itertools
from typing import get_args

import pytest
import torch

from lingrad import optimizers
from lingrad.config.settings import Carry
from lingrad.transforms import registry
from tests.support import cases
from tests.support.cases import BASES, SIDED, SPECS, UNSIDED
from tests.support.models import gap, gpt2, llama, text_batches, three_ways

TOLERANCE = 1e-12
RUN = {"weight_decay": 0.1, "scale": 0.25}

CASES = cases.all_cases()
PAIRS = cases.covering_cases(2)
RARE = (pytest.mark.slow, pytest.mark.rare(60))
KEPT = {id(case) for case in PAIRS}
TRIPLES = [case for case in cases.covering_cases(3) if id(case) not in KEPT]


@pytest.mark.thinned(8)
@pytest.mark.parametrize(
    "case",
    [*(pytest.param(c, id=c.label, marks=pytest.mark.rare(5)) for c in PAIRS)]
    + [pytest.param(c, id=c.label, marks=RARE) for c in TRIPLES],
)
def test_every_combination(case):
    """Transform x side x carry x base x clip, on every kind of weight: micro-batches, schedule, decay, scale, two switches."""
    case.run()


@pytest.mark.thinned(8)
@pytest.mark.rare(24)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.label, marks=() if i % 8 == 0 else pytest.mark.slow) for i, c in enumerate(PAIRS)]
)
def test_every_combination_in_low_precision(case, dtype):
    case.run(dtype)


def test_the_combinations_hold_every_pair_and_every_name():
    """Of transforms, sides, carries, bases and clips; a transform or base that is registered is in them."""
    for i, j in itertools.combinations(range(5), 2):
        pairs, every = ({(repr(c.axes[i]), repr(c.axes[j])) for c in found} for found in (PAIRS, CASES))
        assert pairs == every
    assert {case.rules.partition("(")[0] for case in PAIRS} == set(registry.transform_names())
    assert {case.base for case in PAIRS} == set(optimizers.names())
    assert {case.carry for case in PAIRS} == set(get_args(Carry))


def assert_same_trajectory(build, spec, base, batches, **options):
    wrapped, adapted, switched = three_ways(build, spec, base, batches, **RUN | options)
    assert gap(adapted, wrapped) <= TOLERANCE
    assert gap(switched, wrapped) <= TOLERANCE
    start = {name: p.detach() for name, p in build().named_parameters()}
    assert gap(wrapped, start) > 1e-3  # it did train


# every transform, solver and kind with each base once, the sides in turn
DEFAULT = {
    (text.format(side=cases.SIDES[i % 5]), list(BASES)[i % 3]) for i, text in enumerate((*SIDED, *UNSIDED))
}  # fmt: skip


@pytest.mark.thinned(16)
@pytest.mark.rare(18)
@pytest.mark.parametrize(
    ("spec", "base"),
    [pytest.param(spec, base, marks=() if (spec, base) in DEFAULT else pytest.mark.slow) for spec in SPECS for base in BASES],
)
def test_llama(spec, base):
    """40 steps, refresh every 7, 3 micro-batches, cosine schedule, decay 0.1, scale 0.25, two switches in mid-run."""
    assert_same_trajectory(llama, spec, base, text_batches(40), **BASES[base])


def test_conv1d_of_gpt2():
    assert_same_trajectory(gpt2, "svd(rank=4, every=7)", "adamw", text_batches(16), switches=(5, 9), lr=1e-2)


def test_tied_embeddings():
    """The output head and the embedding are one parameter; a rule on it reaches both uses."""
    rules = {"*embed_tokens": "svd(rank=4, every=5)", "*proj": "random(rank=4, every=5)"}

    def build():
        return llama(tie_word_embeddings=True)

    assert_same_trajectory(build, rules, "adamw", text_batches(12), switches=(4, 8), lr=1e-2)
