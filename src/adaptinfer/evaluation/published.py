"""What papers report, for a separate column. None of it was measured here, and no two papers measured the same."""

from __future__ import annotations

from dataclasses import dataclass

SETTING = "LLaVA-1.5-7B, nominal 64 of 576 tokens, mean over each paper's own benchmarks"

_NOMINAL_SHARE = 64 / 576
_NEAR = 0.015  # shares of vision tokens within this are called the same budget


@dataclass(frozen=True)
class Published:
    """A method's share of vanilla accuracy in print.

    Attributes:
        relative: percent of vanilla, as printed.
        true_tokens: what a decoder layer is really given on average, by our count; None if it is not known.
    """

    relative: str
    true_tokens: float | None = None

    def __str__(self) -> str:
        return f"{self.relative} %" + ("" if self.true_tokens is None else f" at true {self.true_tokens:g}")


_PUBLISHED = {
    "adaptinfer": Published("93.1", 82.9),
    "starpro": Published("96.8", 64),
    "vscan": Published("96.7", 64),
    "cdpruner": Published("95.4", 64),
    "divprune": Published("93.9", 64),
    "vispruner": Published("93.9", 64),
    "visionzip": Published("93.0", 64),
    "dart": Published("92.6–93.7", 99.8),
    "sparsevlm": Published("87.2", 82.2),
    "pyramiddrop": Published("72.5–86.6"),
    "fastv": Published("76.7", 64),
}


def published_for(series: str, share: float) -> Published | None:
    """The printed figure for a method, at the budget that it was printed for; None elsewhere.

    Args:
        series: the method's name; blanks, hyphens and case do not matter, a "+" makes another method.
        share: of the vision tokens that a layer is given here.
    """
    if abs(share - _NOMINAL_SHARE) > _NEAR:
        return None
    return _PUBLISHED.get("".join(letter for letter in series.lower() if letter.isalnum() or letter == "+"))
