"""What every method is: a frozen dataclass that plans stages and chooses vision tokens. No model is known here."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from adaptinfer.errors import AdaptInferError
from adaptinfer.files import write_whole
from adaptinfer.functional import per_sample, top_k_mask
from adaptinfer.pruners.views import FeatureView, Read, StageView
from adaptinfer.schedule import Budget, Schedule, ScheduleError, Stage, solve

Positions = Literal["keep", "compact"]
Need = Literal["embeddings", "output", "next", "rotary", "norm"]

CONFIG_NAME = "adaptinfer_config.json"
FORMAT, VERSION = "adaptinfer.pruner", 1

_USUAL_TOKENS = 576  # LLaVA-1.5's, which published shares are about


class PrunerError(AdaptInferError, ValueError):
    """A pruner was configured with values that make no sense together."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which vision tokens go on from a stage.

    Attributes:
        kept: bool [B, V], aligned with ``view.vision_index``; exactly as many True per sample as the stage keeps.
        score: float [B, V], what the report shows of each token.
        hidden: [B, V, d] hidden states with which the kept tokens go on, where some were merged; None if none was.
            Only methods that need "output" or "next" can change them, for only these act after the layer.
        keeps: how many of each sample are kept, where the method decided that (see `Capabilities.varies`).
    """

    kept: Tensor
    score: Tensor
    hidden: Tensor | None = None
    keeps: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Merging:
    """How a method merges tokens inside the vision tower.

    Attributes:
        groups: (depth of the language model, tokens of a picture) -> groups that the picture ends with.
        step: one step of merging, called in every block, as `adaptinfer.pruners.tome.merge_step` is.
    """

    groups: Callable[[int, int], int]
    step: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a method asks of the engine and what it may do to a call. Engine and servers ask this record, not the class.

    Attributes:
        before: it can have a stage before the language model, at layer -1, and defines `Pruner.select_before`.
        reads: what it needs of the vision tower; nothing, if projected features are enough.
        merging: how it merges tokens inside the vision tower, if it does.
        needs: what it reads besides queries, keys and hidden states of the stage's layer: "embeddings"
            (`StageView.prompt`), "rotary" (`StageView.without_rotary`, `StageView.of_ones`), "norm"
            (`StageView.final_norm`), "output" (the hidden states that leave the layer) and "next" (queries and keys of
            the next layer, in place of its own).
        all_heads: why its score needs all heads at once, as in "chooses among heads"; such a method is refused where
            ranks of tensor parallelism hold some heads each. Empty if the score is a sum over heads.
        varies: it may keep fewer tokens of a sample than the schedule says, by what it sees of it. Counts are then
            known only after a stage, which costs one host read a stage and rules out whatever needs them beforehand:
            static caches, captured graphs, vLLM.
        observes: it only looks: it scores in every layer that has keys of its own, and nothing is dropped.
    """

    before: bool = False
    reads: tuple[Read, ...] = ()
    merging: Merging | None = None
    needs: tuple[Need, ...] = ()
    all_heads: str = ""
    varies: bool = False
    observes: bool = False

    @property
    def acts_after(self) -> bool:
        """Whether a stage acts after its layer, which then computes the outputs of all tokens: no early drop."""
        return "output" in self.needs or "next" in self.needs


@dataclasses.dataclass(frozen=True)
class Pruner:
    """A pruning method: how many vision tokens stay after which layer, and which.

    A method defines `score`, or `select` where it chooses a set that is no ranking.

    Give exactly one of ``budget`` and ``schedule``.

    Attributes:
        budget: wanted true average of vision tokens given to a decoder layer: a number of tokens, or, below 1, a share
            of the prompt's vision tokens. The stages and keeps are solved for each number of vision tokens.
        schedule: stages and keeps, spelled out.
        positions: what happens to rotary positions of the survivors: ``keep`` leaves every token its own;
            ``compact`` renumbers them 0..n-1 after each stage and per layer in decoding, as the published LLaVA code
            of several methods does.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    published: ClassVar[Mapping[str, Schedule]] = MappingProxyType({})
    """Schedules as published, by ``model/label``."""
    published_positions: ClassVar[Positions] = "keep"

    budget: float | None = None
    schedule: Schedule | None = None
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.schedule is None):
            raise PrunerError("give exactly one of budget (tokens, or a share below 1) and schedule")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise PrunerError(f"schedule: must be a Schedule, not {type(self.schedule).__name__}")
        if self.positions not in get_args(Positions):
            raise PrunerError(f"positions: must be one of {get_args(Positions)}, not {self.positions!r}")
        if self.budget is not None:
            try:
                Budget(self.budget)
            except ScheduleError as error:
                raise PrunerError(str(error)) from None

    @property
    def capabilities(self) -> Capabilities:
        """What the method asks of the engine, and what it may do to a call. By default nothing beyond its own layer."""
        return Capabilities()

    def score(self, view: StageView) -> Tensor:
        """Score the vision tokens that entered a stage; the largest stay.

        Returns:
            [B, V], aligned with ``view.vision_index``; entries outside ``view.vision_mask`` are ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor select")

    def select(self, view: StageView, keeps: tuple[int, ...]) -> Selection:
        """Choose the vision tokens that go on: by default those with the largest scores, of equal ones the earlier.

        Args:
            view: of the stage.
            keeps: how many each sample keeps.
        """
        score = self.score(view)
        candidates = torch.ones_like(score, dtype=torch.bool) if view.vision_mask is None else view.vision_mask
        return Selection(top_k_mask(score, candidates, per_sample(keeps, score.device)), score)

    def select_before(self, view: FeatureView) -> Selection:
        """Choose ``view.keep`` vision tokens of each row by their features, before the language model.

        ``hidden`` of the result are features with which kept tokens enter layer 0, for methods that merge.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define select_before")

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        """The schedule for a prompt with that many vision tokens; a function of these counts alone.

        Args:
            num_layers: depth of the model.
            vision_tokens: in the prompt.
            scoring: layers in which a stage may sit; None for all.

        Raises:
            ScheduleError: the budget cannot be met, or the schedule is for a model of another depth.
        """
        if self.schedule is not None:
            self.schedule.check(num_layers)
            return self.schedule
        assert self.budget is not None
        return solve(self.budget, num_layers, vision_tokens, possible=scoring, like=self._nearest(vision_tokens))

    def _nearest(self, vision_tokens: int) -> Schedule | None:
        """The published schedule whose true average is nearest to the budget; None if there is none."""
        assert self.budget is not None
        share = Budget(self.budget).share(vision_tokens)

        def distance(schedule: Schedule) -> float:
            tokens = schedule.vision_tokens or _USUAL_TOKENS
            return abs(schedule.true_average(tokens) / tokens - share)

        return min(self.published.values(), key=distance, default=None)

    @classmethod
    def paper(cls, nominal: int | str, model: str = "llava-1.5-7b") -> Self:
        """The published configuration: schedule by its own label, and positions as the authors' code has them.

        Args:
            nominal: the label; the true average may be larger.
            model: whose published schedule.

        Raises:
            PrunerError: nothing of that name was published.
        """
        name = f"{model}/{nominal}"
        if name not in cls.published:
            there = ", ".join(cls.published) or "none"
            raise PrunerError(f"nominal: {cls.name} has no published schedule {name!r}; there are: {there}")
        return cls(schedule=cls.published[name], positions=cls.published_positions)

    def __call__(self, model: Any) -> Any:
        """Attach to a model for the length of a ``with`` block: ``with pruner(model) as handle: ...``.

        Returns:
            The `Handle` that `adaptinfer.attach` gives. The engine is built on this module, so it is found by name.
        """
        return pkgutil.resolve_name("adaptinfer.engine.attach:attach")(model, self)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``adaptinfer_config.json`` into a folder, made if missing; `adaptinfer.from_pretrained` reads it."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG_NAME, (json.dumps(self.to_document(), indent=2) + "\n").encode())

    def to_document(self) -> dict[str, Any]:
        """The pruner as the JSON object that `save_pretrained` writes."""
        return {"format": FORMAT, "version": VERSION, **_settings(self)}


def _settings(pruner: Pruner) -> dict[str, Any]:
    """Name and settings as JSON takes them; the parts of a composition are pruners themselves."""
    method = type(pruner)
    ours = method.__module__.startswith("adaptinfer.pruners.")
    if not ours and "<locals>" in method.__qualname__:
        raise PrunerError(f"{method.__qualname__}: a class inside a function cannot be found again; define it outside")
    settings: dict[str, Any] = {"method": method.name if ours else f"{method.__module__}:{method.__qualname__}"}
    for field in filter(lambda field: field.init, dataclasses.fields(pruner)):
        value = getattr(pruner, field.name)
        if isinstance(value, Pruner):
            value = _settings(value)
        elif isinstance(value, Schedule):
            value = json.loads(value.to_json())
        settings[field.name] = value
    return settings


def check_setting(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Raise PrunerError unless a setting is a number in [least, most]."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise PrunerError(f"{name}: must be {kind} from {least} to {most}, not {value!r}")


def published_schedules(
    stages: Mapping[int | str, Mapping[int, int | float]], model: str = "llava-1.5-7b", num_layers: int = 32
) -> Mapping[str, Schedule]:
    """Published schedules of one model with 576 vision tokens, from label -> layer -> keep."""
    schedules = {}
    for label, keeps in stages.items():
        name = f"{model}/{label}"
        nominal = float(label) if isinstance(label, int) else None
        placed = tuple(Stage(layer, keep) for layer, keep in keeps.items())
        schedules[name] = Schedule(placed, num_layers, _USUAL_TOKENS, nominal, name)
    return MappingProxyType(schedules)
