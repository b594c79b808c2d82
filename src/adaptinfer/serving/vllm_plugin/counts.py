"""Vision tokens and scoring time, on their way from the engine to the metrics of the front end."""

from __future__ import annotations

from collections import Counter

from adaptinfer.serving.vllm_plugin.plan import Prompt

_PREFIX = "adaptinfer/"


class Counts:
    """What prefills did since somebody last asked.

    Names of the numbers: ``prefills`` that pruned, ``tokens_in`` vision tokens of all prefills, ``token_layers`` vision
    tokens given to layers, summed over layers, ``kept/L`` vision tokens kept after a stage in layer L,
    ``scoring_us`` microseconds spent in scoring.
    """

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self.scoring_seconds = 0.0

    def add(self, prompt: Prompt) -> None:
        """Count the prefill of a prompt."""
        if not prompt.vision:
            return
        self._numbers["tokens_in"] += prompt.vision
        self._numbers["token_layers"] += sum(prompt.given)
        self._numbers["prefills"] += prompt.prunes
        for layer, (given, after) in enumerate(zip(prompt.given, prompt.given[1:], strict=False)):
            if after < given:
                self._numbers[f"kept/{layer}"] += after

    def take(self) -> dict[str, int]:
        """All numbers since the last call, under names that carry a prefix."""
        numbers, self._numbers = self._numbers, Counter()
        whole = int(self.scoring_seconds * 1e6)
        self.scoring_seconds -= whole / 1e6
        numbers["scoring_us"] = whole
        return {_PREFIX + name: number for name, number in numbers.items() if number}

    @staticmethod
    def read(numbers: dict[str, int]) -> dict[str, int]:
        """The numbers that `take` put among others, without their prefix."""
        return {name.removeprefix(_PREFIX): n for name, n in numbers.items() if name.startswith(_PREFIX)}
