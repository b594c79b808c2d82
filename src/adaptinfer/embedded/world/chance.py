"""Random choices for scenes and questions."""

import random
from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

T = TypeVar("T")


class Chance:
    """Random choices that are the same on every machine: all come from ``random.Random(...).random()``, whose stream
    Python guarantees. Equal keys give equal choices.
    """

    __slots__ = ("random",)

    def __init__(self, *keys: int | str | bool) -> None:
        digest = sha256("/".join(map(str, keys)).encode()).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big")).random

    def happens(self, probability: float) -> bool:
        return self.random() < probability

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items, each as likely as its weight says."""
        point = self.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            point -= weight
            if point < 0:
                return item
        return items[-1]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items in random order; all of them if there are fewer."""
        pool = list(items)
        count = min(count, len(pool))
        for place in range(count):
            other = place + int(self.random() * (len(pool) - place))
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def shuffle(self, items: Sequence[T]) -> list[T]:
        """All items in random order, as a new list."""
        return self.sample(items, len(items))
