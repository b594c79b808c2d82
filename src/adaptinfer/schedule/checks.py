"""Numbers read exactly, and errors that name the field that is wrong."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Integral, Real

from adaptinfer.errors import AdaptInferError


class ScheduleError(AdaptInferError, ValueError):
    """A schedule, budget or schedule file that makes no sense; the message starts with the field that is wrong."""


def whole(field: str, value: object, least: int = 0, kind: str = "a whole number") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ScheduleError(f"{field}: must be {kind}, not {value!r}")
    if value < least:
        raise ScheduleError(f"{field}: must be at least {least}, not {value}")
    return int(value)


def positive(field: str, value: object, or_zero: bool = False) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ScheduleError(f"{field}: must be a finite number, not {value!r}")
    if number < 0 or (number == 0 and not or_zero):
        raise ScheduleError(f"{field}: must be {'at least' if or_zero else 'above'} 0, not {value}")
    return number


def exact(number: float) -> Fraction:
    """The decimal number that was meant: 0.7 is 7/10, so that halves round the same way everywhere."""
    return Fraction(repr(float(number)))


def round_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))
