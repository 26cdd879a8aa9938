"""Put the table of papers into docs/papers.md: ``python tools/update_papers.py``.

Names, options and papers are those of the registries; a name without an entry below is an error.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from lingrad.console import markdown
from lingrad.errors import DataError
from lingrad.memory import named

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.marks import put  # noqa: E402

PAGE = ROOT / "docs" / "papers.md"
STATES = ("reproduced", "contradicted", "mixed", "not tested", "out of reach")
REVIEWS = "[film reviews](methods.md#which-trains-best-film-reviews)"
ADDRESSES = "[addresses](methods.md#which-trains-best-pretraining-on-addresses)"
SMOLLM2 = "[SmolLM2](methods.md#which-trains-best-smollm2-on-a-novel)"


class Entry(NamedTuple):
    """What a paper claims, and what is known of it here.

    Args:
        claim: The claim, in one sentence.
        state: One of `STATES`.
        here: What a run here says, or where one is planned, or why there is none.
    """

    claim: str
    state: str
    here: str


HEADINGS = {
    "maps": "does-the-kind-of-map-matter",
    "carry": "what-a-refresh-does-to-moments",
    "pca": "online-pca-svd-or-chance",
    "sides": "one-side-or-two-at-equal-bytes",
    "residuals": "what-a-residual-gives",
    "names": "methods-by-name-at-equal-bytes-of-state",
}


def study(*names: str) -> str:
    """Links to sections of the studies."""
    return "study: " + ", ".join(f"[{name}](studies/index.md#{HEADINGS[name]})" for name in names)


ENTRIES = {
    "finetune": Entry(
        "A fixed random basis on the longer side fine-tunes as well as LoRA for its bytes.",
        "mixed",
        f"as good in {REVIEWS} (79.2 ± 0.5, LoRA 79.2 ± 0.6), 0.038 worse than LoRA at its bytes on {SMOLLM2}; "
        f"{study('names')}",
    ),
    "galore": Entry(
        "Gradients projected to their leading singular vectors pretrain as well as AdamW, with 65.5 % less optimizer state.",
        "mixed",
        f"reproduced in small: 1.899 ± 0.003 where AdamW has 1.917 ± 0.005, on {ADDRESSES}; not in fine-tuning with one rate "
        f"for all: 76.1 ± 2.1 against 79.8 ± 0.6 in {REVIEWS}. 7B is out of reach. The trajectory is galore_torch's: "
        f"`tests/contract/test_galore.py`; {study('names', 'maps')}",
    ),
    "galore_8bit": Entry(
        "With 8-bit moments and updates layer by layer, 7B pretrains on a GPU of 24 GB.",
        "out of reach",
        "simulated, not run: [memory](memory.md); `lingrad memory simulate --model llama-7b --rules 'galore_8bit(rank=1024)' "
        "--layerwise`",
    ),
    "q_galore": Entry(
        "With bases in 4 bits that are refreshed less often and weights in INT8, 7B pretrains on a GPU of 16 GB.",
        "out of reach",
        "the memory is simulated: [7B in INT8](memory.md#7b-in-int8-on-16-gib); no run of that size here",
    ),
    "online_subspace_descent": Entry(
        "A basis that follows the gradients by online PCA pretrains better than one from an SVD, without its time.",
        "contradicted",
        f"in 100 steps from nothing: 2.380 ± 0.019, an SVD every 20 steps 2.320 ± 0.017, one at every step 2.268 ± 0.014; "
        f"{study('pca')}",
    ),
    "lora_fa": Entry(
        "LoRA with A frozen is as accurate as LoRA and saves fewer activations.",
        "mixed",
        f"with the side chosen by its length as good as LoRA in {REVIEWS}, worse on {SMOLLM2}; as published: {study('names')}",
    ),
    "flora": Entry(
        "Random projections that are drawn again compress momentum and accumulated gradients and keep updates of high rank.",
        "not tested",
        f"random maps that are drawn again, with Adam: {study('maps')}",
    ),
    "fira": Entry(
        "Giving back what the basis drops, scaled by what the base does inside it, trains as well as full rank.",
        "reproduced",
        f"in small, with `power` and `transport`: 79.7 ± 0.7 where AdamW has 79.8 ± 0.6, in {REVIEWS}; against the authors' "
        f"program: `tests/contract/test_fira.py`; {study('residuals', 'names')}",
    ),
    "frugal": Entry(
        "Adam in a subspace and signs of the rest pretrain better than GaLore at the same memory.",
        "mixed",
        f"signs of the residual lower the loss of `svd` by 0.070 (0.012 to 0.099); at GaLore's bytes, and with one rate for "
        f"all, 2.391 ± 0.016 where GaLore has 2.203 ± 0.004; {study('residuals', 'names')}",
    ),
    "gum": Entry(
        "Sampling full gradients now and then makes low-rank Muon unbiased, and it converges where GaLore with Muon may not.",
        "not tested",
        "what is unbiased is tested: [sampled](methods.md#what-sampled-is-unbiased-for)",
    ),
    "ldadam": Entry(
        "Moments carried into each new basis, and errors fed back, train near full Adam's loss at a low rank's moments.",
        "contradicted",
        f"in 100 steps: 2.415 ± 0.015 where `svd`, which drops the residual, has 2.320 ± 0.017; {study('residuals', 'names')}. "
        f"`transport` by itself changes little in {REVIEWS}, and in {study('carry')}",
    ),
    "sumo": Entry(
        "Orthogonalised momentum inside a subspace converges faster than GaLore.",
        "contradicted",
        f"in 100 steps: 2.228 ± 0.009 where GaLore has 2.203 ± 0.004, at its bytes; {study('names')}",
    ),
    "lotus": Entry(
        "Switching bases where steps lead nowhere takes 30 % less time than GaLore and trains better.", "not tested",
        "no study; the rule is tested against a loop that has it written out: `tests/contract/test_schedules.py`",
    ),
    "adarankgrad": Entry(
        "The rank of gradients falls in training, so that the rank in use can follow it and save memory.", "not tested",
        "no study; `opt.ranks()` shows the rank in use",
    ),
    "loqt": Entry(
        "Quantised weights with low-rank adapters that are merged at intervals pretrain and fine-tune 7B on 24 GB.",
        "out of reach",
        "no run of that size here; what merges lose and keep is tested: [low-bit](lowbit.md)",
    ),
    "sara": Entry(
        "Singular vectors that are sampled keep the subspace from freezing, and train better than the leading ones.",
        "contradicted",
        f"in 100 steps, too few for a subspace to freeze: 0.019 (0.015 to 0.024) worse than GaLore; {study('names')}",
    ),
    "golore": Entry(
        "GaLore need not converge where gradients are noisy; with random bases late in the run it does.", "not tested",
        "no study that is long enough",
    ),
    "grass": Entry(
        "A basis of rows of the identity trains as well as GaLore, and its projections cost next to nothing.",
        "contradicted",
        f"at GaLore's bytes 2.530 ± 0.004 against 2.203 ± 0.004; at rank 4 `rows` is within 0.05 of `svd`, at 16 and 64 far "
        f"from it; {study('maps', 'names')}",
    ),
    "dct_adamw": Entry(
        "Columns of one cosine transform, chosen by the gradient, do as well as singular vectors for less time and memory.",
        "mixed",
        f"`dct` is 0.30 (0.14 to 0.47) worse than `svd` at rank 16, and not told from it at 64; {study('maps', 'names')}",
    ),
    "lora_xs": Entry(
        "A core of r x r numbers between the singular vectors of a weight fine-tunes like LoRA with far fewer parameters.",
        "not tested",
        f"two-sided bases at equal bytes, of the gradient: {study('sides')}",
    ),
    "deep_lora": Entry(
        "Training stays in invariant subspaces, so that a small core between fixed factors is enough, above all with few data.",
        "not tested",
        "no study",
    ),
    "adamw": Entry(
        "Weight decay apart from the gradient generalises better than Adam's.", "not tested",
        "it is what the others are compared with: [moments and residuals](methods.md)",
    ),
    "muon": Entry(
        "Orthogonalised momentum trains faster than AdamW.",
        "reproduced",
        f"in small, each with one rate for all: 2.159 ± 0.007 where AdamW has 2.496 ± 0.066; {study('names')}",
    ),
    "lora": Entry(
        "Adapters of low rank fine-tune as well as all weights.",
        "reproduced",
        f"79.2 ± 0.6 where AdamW on all weights has 79.8 ± 0.6, in {REVIEWS}; better than AdamW in a short run of {SMOLLM2}",
    ),
    "rslora": Entry("Scaling by the root of the rank lets LoRA gain from larger ranks.", "not tested", "no study"),
    "lora_plus": Entry(
        "A larger rate for B than for A trains better and faster.",
        "not tested",
        f"{study('names')} trains from nothing, which adapters alone cannot",
    ),
    "relora": Entry(
        "LoRA that is merged and started again pretrains like full rank.",
        "not tested",
        f"without the restarts of its learning rate it diverges; {study('names')}",
    ),
    "scale": Entry(
        "Gradients with normalised columns, and momentum in the last layer alone, pretrain like Adam.",
        "reproduced",
        f"in small: 2.309 ± 0.021 where AdamW has 2.496 ± 0.066, for a twenty-seventh of its state; {study('names')}",
    ),
    "apollo": Entry(
        "Scales of gradients, learned in a random subspace, train as well as AdamW with less state.",
        "not tested",
        "no study",
    ),
    "apollo_mini": Entry(
        "One scale for a whole weight, of rank 1, is enough: SGD's memory and AdamW's loss.",
        "reproduced",
        f"in small: 2.487 ± 0.005 where AdamW has 2.496 ± 0.066, for a seventh of its state; {study('names')}",
    ),
}  # fmt: skip
OTHERS = [
    (
        "`lingrad.adapt`, `opt.switch`",
        "Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811",
        Entry(
            "Training in a linear map of the gradient is training a linear adapter; GaLore is a one-sided LoRA.",
            "reproduced",
            "to 1e-12 in float64: [duality](duality.md), over 500 steps: [two modes, one trajectory](studies/duality.md)",
        ),
    ),
    (
        "`slice`, `lingrad.decentralized`",
        "Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811",
        Entry(
            "Workers do better in slices that are chosen to differ than in one and the same.",
            "mixed",
            "it holds where the rank is scarce or workers are few: [the study](decentralized.md#the-study)",
        ),
    ),
    (
        "not here",
        "Ahn et al., 2025, arXiv 2504.05295 (Dion)",
        Entry(
            "Orthonormalised updates of low rank with error feedback scale to sharded training.",
            "out of reach",
            "its update is no linear map of the gradient, so that it has no dual",
        ),
    ),
]


def table() -> str:
    """The table.

    Returns:
        Markdown.

    Raises:
        DataError: A published name has no entry, or an entry no published name.
    """
    known = named.published()
    apart = sorted(known.keys() ^ ENTRIES.keys())
    if apart:
        raise DataError(f"tools/update_papers.py and the registries differ in {', '.join(apart)}; add or remove entries there")
    rows = [("name here", "paper", "claim", "", "here")]
    for name, (written, paper) in known.items():
        source = "of none" if paper.startswith("of none") else paper
        rows.append((f"`{written}`", _linked(source), *_cells(ENTRIES[name])))
    rows += [(written, _linked(paper), *_cells(entry)) for written, paper, entry in OTHERS]
    return markdown(rows)


def _cells(entry: Entry) -> tuple[str, str, str]:
    return entry.claim, f"**{entry.state}**", entry.here


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def main() -> None:
    """Write the table."""
    put(PAGE, {"papers": table()})
    print(f"{PAGE.relative_to(ROOT)} now holds the table")


if __name__ == "__main__":
    main()
