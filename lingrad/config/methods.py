"""Published methods by name: each is a combination of a transform, a base optimizer and options of a run.

A name is written like a config string, ``galore(rank=128)``, wherever rules for a whole model are taken. In the brackets are
options of its transform, and ``base`` and options of `lingrad.wrap` in place of the method's own.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from lingrad import optimizers
from lingrad.config import spec
from lingrad.config.settings import Settings
from lingrad.errors import LingradError, SpecError, did_you_mean, require
from lingrad.transforms import registry

F = TypeVar("F", bound=Callable[..., Any])

BASE, DEFAULT = "adamw", "finetune"  # of `lingrad.wrap`
_NAME = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(\(|$)")


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
}


@dataclass(frozen=True)
class Chosen:
    """A method with its options filled in.

    Args:
        rules: The config string.
        base: The base.
        base_options: Options of the base.
        settings: Options of the run.
    """

    rules: str
    base: Any
    base_options: Mapping[str, Any]
    settings: Mapping[str, Any]

    def given(self, options: Mapping[str, Any]) -> Chosen:
        """With other options in place of the method's own.

        Args:
            options: ``base``, as a name, a name with options, a class or a factory; ``moments``; options of a run.

        Returns:
            The method; of its base's options those that another base takes.
        """
        base, of_base = options.get("base", self.base), dict(self.base_options)
        if base != self.base:
            base, more = _named_base(base)
            of_base = {key: value for key, value in of_base.items() if _accepts(base, key, value)} | more
        of_base |= {key: value for key, value in options.items() if key == "moments"}
        own = {key: value for key, value in options.items() if key not in ("base", "moments")}
        return Chosen(self.rules, base, of_base, {**self.settings, **own})

    def __str__(self) -> str:
        options = {**self.settings, **self.base_options}
        base = optimizers.base.name_of(self.base)
        return ", ".join([f'"{self.rules}"', f'"{base}"', *(f"{key}={value!r}" for key, value in options.items())])


def method_of(rules: object) -> Chosen | None:
    """The method that rules name.

    Args:
        rules: Rules of any form.

    Returns:
        The method; None where they are no name of one.

    Raises:
        SpecError: An option is unknown, or one is missing; or a name is nearly that of a method.
    """
    found = _NAME.match(rules) if isinstance(rules, str) else None
    name = "" if found is None else found[1].lower().replace("-", "_")
    if name not in METHODS or not isinstance(rules, str) or found is None:
        known = registry.transform_names()
        near = did_you_mean(name, [*METHODS, *known])
        if name and name not in known and any(f"'{method}'" in near for method in METHODS):
            raise SpecError(f"unknown transform or method '{name}'{near}")
        return None
    method = METHODS[name]
    given = dict(spec.parse_choice(name + rules[found.end(1) :]).options)
    takes = [*method.options, "base", "moments", *Settings.names()]
    for option in given:
        near = did_you_mean(option, takes)
        require(option in takes, option, f"method '{name}' has no option '{option}'{near} It takes: {', '.join(takes)}.")
    values = {**method.options, **{key: value for key, value in given.items() if key in method.options}}
    for key, value in values.items():
        require(value is not None, key, f"method '{name}' needs {key}, as in {name}({key}=...)")
    chosen = Chosen(spec.format(spec.parse(method.spec.format(**values))), method.base, method.base_options, method.settings)
    return chosen.given({key: value for key, value in given.items() if key not in method.options})


def takes_methods(function: F) -> F:
    """Have a function whose arguments are ``rules``, ``base`` and options of a run take the name of a method as rules.

    Args:
        function: The function. What its caller gives replaces what the method has of its own.

    Returns:
        The function, of the same signature.
    """
    signature = inspect.signature(function)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(function)
    def taking(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs).arguments
        chosen = method_of(bound.get("rules", signature.parameters["rules"].default))
        if chosen is None:
            return function(*args, **kwargs)
        given = {**{key: value for key, value in bound.items() if key != rest}, **bound.get(rest, {}), "rules": chosen.rules}
        chosen = chosen.given({"base": given["base"]} if "base" in given else {})
        own = {"base": chosen.base, **chosen.base_options, **chosen.settings}
        return function(**{**own, **given})

    return cast("F", taking)


def _named_base(base: Any) -> tuple[Any, dict[str, Any]]:
    """A base and its options, of a string such as ``sgd(momentum=0.9)``."""
    if not isinstance(base, str) or "(" not in base:
        return base, {}
    choice = spec.parse_choice(base)
    return choice.name, dict(choice.options)


def _accepts(base: Any, option: str, value: Any) -> bool:
    try:
        optimizers.find(base, {option: value}, decay=False)
    except LingradError:
        return False
    return True


def long_rules(rules: Any) -> Any:
    """The config string of the method that rules name, or the rules themselves."""
    chosen = method_of(rules)
    return rules if chosen is None else chosen.rules


def refuse_method(text: str) -> None:
    """Refuse the name of a method where a config string of one transform is expected.

    Args:
        text: The string.

    Raises:
        SpecError: It names a method.
    """
    chosen = method_of(text)
    if chosen is not None:
        raise SpecError(
            f"'{text.strip()}' is a method, which sets options of the whole run, and no transform. Give it alone, in place of "
            f"rules, or its parts: {chosen}"
        )
