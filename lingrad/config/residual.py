"""What becomes of the part of a gradient that no coordinates can express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lingrad.config.spec import parse_choice
from lingrad.errors import SpecError, require, require_one_of, shown

Kind = Literal["scaled", "sign", "feedback", "sampled"]
OPTIONS: dict[str, str | None] = {"scaled": "limit", "sign": "factor", "feedback": None, "sampled": "q"}


@dataclass(frozen=True)
class Residual:
    """A rule for R = G - S z, where S z is the nearest to the gradient G [m, n] that coordinates can express.

    Args:
        kind: ``scaled`` steps along R as far as the base's step is along the gradient of the coordinates, row by row or column
            by column (Chen et al., Fira, 2024, arXiv 2410.01623, section 4). ``sign`` steps along the signs of R (Zmushko et
            al., FRUGAL, ICML 2025, arXiv 2411.07837, algorithm 1). ``feedback`` adds R to the next step's gradient (Robert et
            al., LDAdam, ICLR 2025, arXiv 2410.16103, section 3.3). ``sampled`` draws, for each weight and step, whether to step
            along R / q, as far as the base's step is along the gradient of the coordinates, or not at all (after Pan et al.,
            GUM, 2025, arXiv 2510.17802).
        limit: Of ``scaled``: by which factor |step| / learning rate may grow from one step to the next.
        factor: Of ``sign``: multiplies the learning rate of the coordinates.
        q: Of ``sampled``: the probability of a draw.

    Raises:
        SpecError: An option is wrong.
    """

    kind: Kind
    limit: float = 1.01
    factor: float = 1.0
    q: float = 0.1

    def __post_init__(self) -> None:
        """Check the options."""
        require_one_of(self.kind, get_args(Kind), "residual")
        for option, least in (("limit", 1.0), ("factor", 0.0)):
            value = getattr(self, option)
            fits = _is_number(value) and least <= value < float("inf")
            require(fits, "residual", f"{option} of residual='{self.kind}' must be a number, {least:g} or more, not {value!r}")
        fits = _is_number(self.q) and 0 < self.q <= 1
        require(fits, "residual", f"q of residual='{self.kind}' must be a number above 0, 1 at most, not {self.q!r}")

    @property
    def chance(self) -> float:
        """The probability with which a step reads the gradient of a weight itself: 1 of a rule that is not ``sampled``."""
        return self.q if self.kind == "sampled" else 1.0

    def __str__(self) -> str:
        option = OPTIONS[self.kind]
        default = None if option is None else Residual.__dataclass_fields__[option].default
        value = None if option is None else getattr(self, option)
        return self.kind if value == default else f"{self.kind}({option}={value!r})"


def parse_residual(text: str) -> Residual:
    """Read a rule from its config string.

    Args:
        text: Such as ``scaled``, ``scaled(limit=1.1)``, ``sign(factor=0.5)``, ``feedback``, ``sampled(q=0.1)``.

    Returns:
        The rule.

    Raises:
        SpecError: The string is malformed, or names an unknown rule or option.
    """
    expected = "expected scaled, sign, feedback or sampled, or one with its option, such as scaled(limit=1.1)"
    require(isinstance(text, str), "residual", f"residual must be a word, not {shown(text)}: {expected}")
    try:
        choice = parse_choice(text)
        require_one_of(choice.name, get_args(Kind), "residual")
        known = OPTIONS[choice.name]
        for option, _ in choice.options:
            takes = "no options" if known is None else known
            require(option == known, "residual", f"residual='{choice.name}' has no option '{option}'; it takes {takes}")
        return Residual(choice.name, **dict(choice.options))  # type: ignore[arg-type]
    except SpecError as error:
        named = "residual" in str(error)
        raise SpecError(str(error) if named else f"residual={text!r}: {expected}\n{error}", option="residual") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
