"""A budget: how many vision tokens the layers are given on average, as a number of tokens or as a share."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

from adaptinfer.schedule.checks import ScheduleError, exact, round_half_up

_MOST = 2**31  # tokens


@dataclass(frozen=True)
class Budget:
    """A true average of vision tokens per decoder layer: a number of tokens, or, below 1, a share of the prompt's.

    Only this class decides which of the two a number is. Everything is computed exactly, from the decimal number that
    was written: 0.7 is 7/10.

    Attributes:
        amount: as given; above 0.

    Raises:
        ScheduleError: the amount is not a positive number; the message starts with ``budget:``.
    """

    amount: float

    def __post_init__(self) -> None:
        known = isinstance(self.amount, Real) and not isinstance(self.amount, bool)
        if not (known and 0 < self.amount <= _MOST):
            raise ScheduleError(f"budget: must be a positive number of tokens, or a share below 1, not {self.amount!r}")

    @classmethod
    def parse(cls, value: Budget | float | str) -> Budget:
        """The budget that a number, or text as a user types it, stands for.

        Raises:
            ScheduleError: as the class.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            try:
                return cls(int(value) if value.strip().isdecimal() else float(value))
            except ValueError:
                pass  # the class names what it was given
        return cls(value)  # pyright: ignore[reportArgumentType]

    @property
    def is_share(self) -> bool:
        """Whether it is a share of the prompt's vision tokens, not a number of tokens."""
        return self.amount < 1

    def tokens(self, vision_tokens: int) -> Fraction:
        """Vision tokens per layer, for a prompt with that many.

        Raises:
            ScheduleError: it is more than there are.
        """
        wanted = self.share(vision_tokens) * vision_tokens
        if wanted > vision_tokens:
            raise ScheduleError(f"budget: {self} is more than the {vision_tokens} vision tokens there are")
        return wanted

    def share(self, vision_tokens: float) -> Fraction:
        """The share of the prompt's vision tokens; above 1 if it is more than there are."""
        return exact(self.amount) / (1 if self.is_share else exact(vision_tokens))

    def whole_tokens(self, vision_tokens: int, factor: float = 1) -> int:
        """`tokens` times a factor as a whole number: halves rounded up, at least one, at most all.

        Raises:
            ScheduleError: the budget itself is more than there are, or less than half a token.
        """
        wanted = self.tokens(vision_tokens)
        if wanted < Fraction(1, 2):
            raise ScheduleError(f"budget: {self} of {vision_tokens} vision tokens is less than half a token; take more")
        return min(vision_tokens, max(1, round_half_up(wanted * exact(factor))))

    def within(self, vision_tokens: int, entering: int) -> Budget:
        """The same number of tokens as a budget for the ``entering`` tokens that an earlier selection leaves.

        Raises:
            ScheduleError: it is more than the prompt has.
        """
        wanted = self.tokens(vision_tokens)
        return Budget(float(wanted if wanted >= 1 else wanted / entering))

    def __str__(self) -> str:
        return str(self.amount)
