"""What the names of published methods stand for; how a name is read is in `lingrad.config.methods`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASE, DEFAULT = "adamw", "finetune"  # of `lingrad.wrap`


@dataclass(frozen=True, kw_only=True)
class NamedMethod:
    """A method and where it was published.

    Args:
        spec: Its config string, with its options in braces.
        options: The options with their defaults; None must be given.
        base: Its base optimizer.
        base_options: Options of that base.
        settings: Options of the run.
        paper: Authors, year, arXiv number, and where in it.
        differs: What lingrad does otherwise; empty if nothing is known.
    """

    spec: str
    options: Mapping[str, Any] = field(default_factory=lambda: {"rank": None, "every": 200, "side": "short"})
    base: str = BASE
    base_options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    paper: str
    differs: str = ""


_SVD = "svd(rank={rank}, every={every}, side={side})"

METHODS: dict[str, NamedMethod] = {
    "finetune": NamedMethod(
        spec="random(rank={rank}, every=0, kind=orthonormal, side=long, clip=true)",
        options={"rank": 32},
        settings={"scale": "norm"},
        paper="of none: what lingrad.wrap and adapt do without rules; docs/which-method.md says why",
    ),
    "galore": NamedMethod(
        spec=_SVD,
        settings={"scale": 0.25},
        paper="Zhao et al., ICML 2024, arXiv 2403.03507, algorithm 2",
        differs='eps, decay and signs are those of compat="galore" only with that option',
    ),
    "galore_8bit": NamedMethod(
        spec=_SVD,
        base_options={"moments": "8bit"},
        settings={"scale": 0.25},
        paper="Zhao et al., ICML 2024, arXiv 2403.03507, section 4.3",
        differs="moments are coded by lingrad's own blocks, for any base",
    ),
    "q_galore": NamedMethod(
        spec="coded(each=svd(rank={rank}, every={every}, side={side}, schedule=overlap()), bits=4)",
        base_options={"moments": "8bit"},
        settings={"scale": 0.25, "rounding": "stochastic"},
        paper="Zhang et al., 2024, arXiv 2407.08296, algorithm 1",
        differs="two codes in a byte, symmetric; all columns of a basis are compared, not the first; weights in 8 or 16 bits",
    ),
    "online_subspace_descent": NamedMethod(
        spec="pca(rank={rank}, side={side})",
        options={"rank": None, "side": "short"},
        paper="Liang et al., NeurIPS 2024, arXiv 2408.12857, algorithm 1",
        differs="the gradient of the basis is computed in closed form",
    ),
    "lora_fa": NamedMethod(
        spec="random(rank={rank}, every=0, kind=gaussian, side=right)",
        options={"rank": None},
        paper="Zhang et al., 2023, arXiv 2308.03303, section 3",
    ),
    "flora": NamedMethod(
        spec="random(rank={rank}, every={every}, kind=gaussian, side={side})",
        base="sgd",
        base_options={"momentum": 0.9},
        settings={"carry": "rotate"},
        paper="Hao et al., ICML 2024, arXiv 2402.03293, algorithm 2",
        differs="its momentum alone; the paper puts it into Adafactor",
    ),
    "fira": NamedMethod(spec=_SVD, settings={"residual": "scaled"}, paper="Chen et al., 2024, arXiv 2410.01623, section 4"),
    "frugal": NamedMethod(
        spec="random(rank={rank}, every={every}, kind=rows, side={side})",
        settings={"residual": "sign", "carry": "rotate"},
        paper="Zmushko et al., ICML 2025, arXiv 2411.07837, algorithm 1",
        differs="rows or columns of every weight are chosen at random, where the paper also has whole layers",
    ),
    "gum": NamedMethod(
        spec=_SVD,
        base="muon",
        settings={"residual": "sampled(q=0.1)", "carry": "reset"},
        paper="Pan et al., 2025, arXiv 2510.17802",
        differs="a weight is drawn for a step, not for a period, and its coordinates step in any case; its residual is stepped "
        "along by R / q times |step of Muon| / |gradient of the coordinates|, without momentum and not orthogonalised",
    ),
    "ldadam": NamedMethod(
        spec="power(rank={rank}, every=1, side={side})",
        options={"rank": None, "side": "short"},
        base_options={"betas": (0.908, 0.99)},
        settings={"carry": "transport", "residual": "feedback"},
        paper="Robert et al., ICLR 2025, arXiv 2410.16103, algorithm 1",
        differs="a basis is learned from the gradient of a step and used from the next one on, the paper's from the mean too",
    ),
    "sumo": NamedMethod(
        spec=_SVD,
        base="muon",
        settings={"carry": "rotate"},
        paper="Refael et al., 2025, arXiv 2505.24749, algorithm 1",
        differs="moments are orthogonalised by Newton and Schulz' iteration, where the paper takes an SVD",
    ),
    "lotus": NamedMethod(
        spec="svd(rank={rank}, every={every}, side={side}, solver=randomized, "
        "schedule=path(threshold={threshold}, measure=displacement))",
        options={"rank": None, "every": 50, "side": "short", "threshold": 0.01},
        paper="Miao et al., 2026, arXiv 2602.01233, algorithm 1",
        differs="a basis is learned from a sketch of a step's gradient and used from the next one on; section 3.1 has another "
        "figure too, which is schedule=path(measure=efficiency)",
    ),
    "adarankgrad": NamedMethod(
        spec="svd(rank={rank}, every={every}, side={side}, energy={energy})",
        options={"rank": None, "every": 200, "side": "short", "energy": 0.9},
        settings={"carry": "rotate"},
        paper="Refael et al., ICLR 2025, arXiv 2410.17881",
        differs="refreshes at fixed steps or by schedule, not where the projected gradient has become small; energy is the "
        "share that is kept; squares move by (C∘C) v; columns that drop out keep their memory",
    ),
    "loqt": NamedMethod(
        spec=_SVD,
        settings={"keep_remainder": True},
        paper="Loeschcke et al., NeurIPS 2024, arXiv 2405.16528, algorithm 1",
        differs="for adapter mode on weights in 4 or 8 bits; intervals do not grow",
    ),
    "sara": NamedMethod(
        spec="svd(rank={rank}, every={every}, side={side}, choice=sigma)",
        settings={"scale": 0.25},
        paper="Zhang et al., NeurIPS 2025, arXiv 2502.05790",
        differs="a vector has the sign that it has against a fixed random one",
    ),
    "golore": NamedMethod(
        spec="switch(rank={rank}, every={every}, side={side}, after={after})",
        options={"rank": None, "after": None, "every": 200, "side": "short"},
        settings={"scale": 0.25},
        paper="He et al., ICML 2025, arXiv 2410.11289",
        differs="the gradient is read at the random refreshes too, whose bases do not depend on it",
    ),
    "grass": NamedMethod(
        spec="rows(rank={rank}, every={every}, side={side}, choice={choice})",
        options={"rank": None, "every": 200, "side": "short", "choice": "top"},
        settings={"carry": "reset"},
        paper="Muhamed et al., 2024, arXiv 2406.17660",
        differs="rows that are sampled are drawn without replacement, and not scaled by their probabilities",
    ),
    "dct_adamw": NamedMethod(
        spec="dct(rank={rank}, every={every}, side={side}, store=false)",
        settings={"carry": "rotate", "residual": "feedback"},
        paper="Modoranu et al., 2025, arXiv 2505.17967",
        differs="columns are ranked by 2-norms, products take no FFT, and the error that is fed back is not quantised",
    ),
    "lora_xs": NamedMethod(
        spec="weight(rank={rank}, side=both)",
        options={"rank": None},
        paper="Bałazy et al., 2024, arXiv 2405.17604",
        differs="the basis leaves out the singular values, and coordinates start at zero, not at small random values",
    ),
    "deep_lora": NamedMethod(
        spec="svd(rank={rank}, every=0, side=both)",
        options={"rank": None},
        paper="Yaras et al., ICML 2024, arXiv 2406.04112",
        differs="the core is one matrix that starts at zero, not a product of three that start small; the outer factors are "
        "leading singular vectors of the first gradient alone, and are not trained",
    ),
}
