"""Where vision tokens are dropped and how many remain: stages, schedules, what they cost, and a solver for budgets.

Arithmetic only: no torch, no transformers, no scores. Counts depend on the number of vision tokens alone, so every
prompt with as many vision tokens has the same shapes in every layer.

The averages of a schedule, all in vision tokens per layer (nominal <= computed <= true):

- true: what the layers are given, and what their KV caches hold. Budgets of this library are true averages.
- computed: the work really done, since a stage's layer stops working for a token once the token is dropped.
- nominal: the count of arXiv 2508.06084, which takes a stage's layer at its size after pruning. Its "64 tokens" are
  82.9 in the true count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adaptinfer.errors import AdaptInferError
from adaptinfer.files import write_whole

FORMAT = "adaptinfer.schedule"
VERSION = 1
BEFORE = -1
"""The layer of a stage that acts before the language model: layer 0 is given what it keeps."""


class ScheduleError(AdaptInferError, ValueError):
    """A schedule, budget or schedule file that makes no sense; the message starts with the field that is wrong."""


@dataclass(frozen=True)
class Stage:
    """Layer `layer` (from 0) still attends over all it was given; from layer + 1 on only `keep` vision tokens remain.

    Layer -1 (`BEFORE`) is a selection before the language model: layer 0 is given `keep` vision tokens.

    `keep` as an int counts vision tokens; as a float in [0, 1] it is a share of those that enter the stage (so 1 is one
    token and 1.0 is all of them). A stage is validated by the Schedule it is put into, which knows its place.
    """

    layer: int
    keep: int | float


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a language model that decide its FLOPs and KV bytes: dense decoder layers with a gated MLP.

    A mixture-of-experts model is counted as if `intermediate_size` were its active width.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            object.__setattr__(self, field, _whole(field, value, least=1))

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read a transformers config, of a language model or of a VLM. Raises ScheduleError("config.<field>: ...").

        Layers that differ (Gemma 4, linear attention, the first dense layers of a mixture of experts) are counted as if
        all were of the kind that is most frequent.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        kinds = list(getattr(text, "layer_types", None) or [])
        layers = getattr(text, "per_layer_config", None)
        usual = layers[max(range(len(kinds)), key=lambda i: kinds.count(kinds[i]))] if layers and kinds else text

        def read(field: str) -> int:
            return _whole(f"config.{field}", getattr(usual, field, None), least=1)

        hidden_size, num_heads = read("hidden_size"), read("num_attention_heads")
        return cls(
            num_layers=_whole("config.num_hidden_layers", getattr(text, "num_hidden_layers", None), least=1),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=getattr(usual, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(usual, "head_dim", None) or hidden_size // num_heads,
            intermediate_size=_active_width(usual)
            or read("ffn_dim" if hasattr(usual, "ffn_dim") else "intermediate_size"),
        )

    def layer_flops(self, tokens: int, kept: int | None = None) -> int:
        """FLOPs (2 x multiply-adds) of one decoder layer given `tokens` tokens that needs outputs for `kept` of them.

        Q, K and V projections run for all tokens (the queries of dropped ones exist before the selection is known),
        output projection and MLP for the kept ones. Attention (Q K^T and A V) is counted at the causal half: a row
        goes over tokens / 2 keys, which is the mean over all rows, and what kept rows meet if they lie anywhere.
        Norms, softmax, rotary embedding and the scoring itself are not counted.
        """
        kept = tokens if kept is None else kept
        attention = 2 * 2 * kept * tokens * self.num_heads * self.head_dim // 2
        return 2 * (tokens * self._qkv_weights + kept * self._other_weights) + attention

    @property
    def dropped_share(self) -> float:
        """Cost of a token in the layer that drops it (Q, K, V) as a share of one that stays; attention left out."""
        return self._qkv_weights / (self._qkv_weights + self._other_weights)

    @property
    def _qkv_weights(self) -> int:
        return self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)

    @property
    def _other_weights(self) -> int:
        return self.hidden_size * (self.num_heads * self.head_dim + 3 * self.intermediate_size)


@dataclass(frozen=True)
class Schedule:
    """Stages for a model with `num_layers` decoder layers. Without stages nothing is pruned.

    `vision_tokens` is the count that int keeps are meant for (576 for LLaVA-1.5): a prompt with another number of
    vision tokens gets them scaled in proportion. None takes int keeps literally. `nominal` is the label in the paper
    (tokens, or a share if below 1), `name` is free text; neither changes anything.

    Methods take `vision_tokens`, the number in the prompt; None stands for the schedule's own.

    Raises ScheduleError for stages that are out of order or in the last layer (whatever it drops, nobody would read),
    for keeps that grow, and for values of the wrong type.
    """

    stages: tuple[Stage, ...]
    num_layers: int
    vision_tokens: int | None = None
    nominal: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        def normalise(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        normalise("num_layers", _whole("num_layers", self.num_layers, least=1))
        if self.vision_tokens is not None:
            normalise("vision_tokens", _whole("vision_tokens", self.vision_tokens, least=1))
        if self.nominal is not None:
            normalise("nominal", _positive("nominal", self.nominal))
        if self.name is not None and not isinstance(self.name, str):
            raise ScheduleError(f"name: must be text, not {self.name!r}")
        normalise("stages", _checked_stages(self.stages, self.num_layers, self.vision_tokens))

    def keeps(self, vision_tokens: int | None = None) -> tuple[int, ...]:
        """Vision tokens that each stage keeps, halves rounded up; never growing, never more than enter the stage.

        Raises ScheduleError if a literal int keep exceeds what enters its stage.
        """
        prompt = self._prompt_tokens(vision_tokens)
        entering, keeps = prompt, []
        for index, stage in enumerate(self.stages):
            if isinstance(stage.keep, float):
                kept = _round_half_up(_exact(stage.keep) * entering)
            elif self.vision_tokens is not None:
                kept = min(entering, _round_half_up(Fraction(stage.keep * prompt, self.vision_tokens)))
            else:
                kept = stage.keep if prompt else 0
            if kept > entering:
                raise ScheduleError(
                    f"stages[{index}].keep: {kept} vision tokens are to be kept, but only {entering} enter this stage "
                    f"({prompt} in the prompt); set vision_tokens so that keeps scale with the prompt, or use shares"
                )
            keeps.append(kept)
            entering = kept
        return tuple(keeps)

    def tokens_per_layer(self, vision_tokens: int | None = None) -> tuple[int, ...]:
        """Vision tokens given to each layer, which is also what its KV cache holds."""
        return tuple(given for given, _ in self._given_and_kept(vision_tokens))

    def true_average(self, vision_tokens: int | None = None) -> float:
        """Vision tokens given to a layer (and held in its KV cache), averaged over layers."""
        return sum(self.tokens_per_layer(vision_tokens)) / self.num_layers

    def nominal_average(self, vision_tokens: int | None = None) -> float:
        """The average as arXiv 2508.06084 counts it: a stage's layer at its size after pruning."""
        return sum(kept for _, kept in self._given_and_kept(vision_tokens)) / self.num_layers

    def computed_average(self, shape: ModelShape, vision_tokens: int | None = None) -> float:
        """Vision tokens worked for per layer with early drop: a stage counts `shape.dropped_share` for each dropped."""
        self.check(shape.num_layers)
        work = sum(kept + (given - kept) * shape.dropped_share for given, kept in self._given_and_kept(vision_tokens))
        return work / self.num_layers

    def prefill_flops(
        self, shape: ModelShape, text_tokens: int, vision_tokens: int | None = None, early_drop: bool = True
    ) -> float:
        """FLOPs of one prompt's prefill in the decoder layers (`ModelShape.layer_flops`); no lm_head, no vision tower.

        Without `early_drop` a stage's layer works in full for the tokens it is about to drop. LLaVA-1.5-7B with 92 text
        tokens and 133/27/3 saves 74.0 % so, and 76.0 % with early drop (76.3 % if dropped tokens also went without Q).
        """
        self.check(shape.num_layers)
        text = _whole("text_tokens", text_tokens)
        return float(
            sum(
                shape.layer_flops(given + text, kept + text if early_drop else None)
                for given, kept in self._given_and_kept(vision_tokens)
            )
        )

    def kv_bytes(
        self,
        shape: ModelShape,
        text_tokens: int,
        vision_tokens: int | None = None,
        bytes_per_value: int = 2,
        batch: int = 1,
    ) -> int:
        """Bytes that the KV cache holds after the prefill of `batch` such prompts."""
        self.check(shape.num_layers)
        tokens = sum(self.tokens_per_layer(vision_tokens)) + self.num_layers * _whole("text_tokens", text_tokens)
        per_token = 2 * shape.num_kv_heads * shape.head_dim * _whole("bytes_per_value", bytes_per_value, least=1)
        return _whole("batch", batch, least=1) * tokens * per_token

    def check(self, num_layers: int) -> None:
        """Raise ScheduleError unless this schedule is for a model with `num_layers` decoder layers."""
        if num_layers != self.num_layers:
            raise ScheduleError(
                f"num_layers: the schedule is for {self.num_layers} layers, the model has {num_layers}; "
                "ask for a budget instead, which is solved for a model's own depth"
            )

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The reverse of `to_json`. Raises ScheduleError with the path of the field that is wrong."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ScheduleError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise ScheduleError(f"document: not readable as JSON: {error}") from None
        return cls(**_fields_of_document(data))

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file. Raises ScheduleError if it cannot be written."""
        try:
            write_whole(path, self.to_json().encode())
        except OSError as error:
            raise ScheduleError(f"path: cannot write {str(path)!r}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read what `save` wrote. Raises ScheduleError that names the file, and the field if one is wrong."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ScheduleError(f"path: {str(path)!r} is not UTF-8 text (byte {error.start})") from None
        except (OSError, ValueError) as error:
            raise ScheduleError(f"path: cannot read {str(path)!r}: {getattr(error, 'strerror', error)}") from error
        try:
            return cls.from_json(text)
        except ScheduleError as error:
            raise ScheduleError(f"{error} (in {str(path)!r})") from None

    def _given_and_kept(self, vision_tokens: int | None) -> list[tuple[int, int]]:
        """Per layer: vision tokens given to it, and those it hands on."""
        kept_at = dict(zip((stage.layer for stage in self.stages), self.keeps(vision_tokens), strict=True))
        given, per_layer = kept_at.get(BEFORE, self._prompt_tokens(vision_tokens)), []
        for layer in range(self.num_layers):
            kept = kept_at.get(layer, given)
            per_layer.append((given, kept))
            given = kept
        return per_layer

    def _prompt_tokens(self, vision_tokens: int | None) -> int:
        if vision_tokens is None and self.vision_tokens is None:
            raise ScheduleError("vision_tokens: the schedule names no count of its own, so say how many the prompt has")
        return _whole("vision_tokens", self.vision_tokens if vision_tokens is None else vision_tokens)


def solve(
    budget: float,
    num_layers: int,
    vision_tokens: int,
    layers: Sequence[int] | None = None,
    shape: Sequence[int | float] | None = None,
    possible: Sequence[int] | None = None,
    like: Schedule | None = None,
) -> Schedule:
    """A schedule whose true average is `budget`: vision tokens per layer, or a share of all of them if below 1.

    `layers` are the stages' layers. None takes the published depths, 1, 10 and 20 of 32, in proportion, and puts the
    first stage earlier as long as the layers up to it would take more than 3/4 of the budget. `shape` gives the
    proportions of the keeps, one per stage, never growing. None takes those of the published schedule with the nearest
    label (per 576 vision tokens). `possible` names the layers in which a stage can sit at all (a model with linear
    attention has others): the default layers then move to the nearest of these, the first one rather to an earlier.
    `like` is another published schedule, whose depths and proportions take the place of these defaults.

    Keeps are whole tokens near those proportions, and none exceeds `vision_tokens` (later stages then get more). The
    average comes out at most 1 % below the budget, else at most 1 % above it, else as near as whole tokens come: one
    token in a stage is one in every layer up to the next stage, so the error stays within half the longest such span,
    divided by num_layers (0.17 tokens on 32 layers). A stage that would drop nothing is left out.

    Raises ScheduleError("budget: ...") if the budget is above the token count, or below what the layers up to the first
    stage are given in any case.
    """
    num_layers = _whole("num_layers", num_layers, least=1)
    vision_tokens = _whole("vision_tokens", vision_tokens, least=1)
    number = _positive("budget", budget)
    average = _exact(number) * (vision_tokens if number < 1 else 1)
    if average > vision_tokens:
        raise ScheduleError(f"budget: {budget} is more than the {vision_tokens} vision tokens there are")
    if average == vision_tokens:
        return Schedule((), num_layers, vision_tokens)

    total = average * num_layers  # in token-layers, exact
    if like is not None:
        layers, shape = _solver_stages_like(like, num_layers, vision_tokens, total, possible)
    depths = _solver_layers(layers, num_layers, vision_tokens, total, possible)
    head = vision_tokens * (depths[0] + 1) if depths else vision_tokens * num_layers
    if head > total:
        where = f"layer {depths[0]}" if depths else f"the last layer, {num_layers - 1}"
        raise ScheduleError(
            f"budget: a true average of {float(average):.4g} vision tokens is out of reach: all {vision_tokens} pass "
            f"through {where}, which makes {head / num_layers:.4g} on {num_layers} layers even if none is kept after; "
            "take a larger budget" + (" or an earlier first stage" if depths and depths[0] > 0 else "")
        )
    proportions = _solver_shape(shape, depths, label=average / vision_tokens * 576)
    spans = [after - layer for layer, after in zip(depths, [*depths[1:], num_layers - 1], strict=True)]
    ideal = _ideal_keeps(total - head, spans, proportions, vision_tokens)
    keeps = _whole_keeps(ideal, spans, total - head, total / 100, vision_tokens)
    stages, entering = [], vision_tokens
    for layer, keep in zip(depths, keeps, strict=True):
        if keep < entering:
            stages.append(Stage(layer, keep))
        entering = keep
    return Schedule(tuple(stages), num_layers, vision_tokens)


def preset(name: str) -> Schedule:
    """A published schedule by its name in PRESETS. Raises ScheduleError that lists the names."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ScheduleError(f"name: there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def _checked_stages(stages: object, num_layers: int, vision_tokens: int | None) -> tuple[Stage, ...]:
    """The stages with plain ints and floats in them, once they are known to make sense."""
    if not isinstance(stages, (tuple, list)):
        raise ScheduleError(f"stages: must be a tuple of Stage, not {stages!r}")
    for index, stage in enumerate(stages):
        if not isinstance(stage, Stage):
            raise ScheduleError(f"stages[{index}]: must be a Stage, not {stage!r}")
    layers = _checked_layers("stages[{}].layer", [stage.layer for stage in stages], num_layers, least=BEFORE)
    checked: list[Stage] = []
    entering = vision_tokens  # None as long as it depends on the prompt
    for index, (layer, stage) in enumerate(zip(layers, stages, strict=True)):
        keep = _checked_keep(f"stages[{index}].keep", stage.keep)
        if isinstance(keep, float):
            entering = None if entering is None else _round_half_up(_exact(keep) * entering)
        elif entering is not None and keep > entering:
            raise ScheduleError(f"stages[{index}].keep: {keep} is more than the {entering} vision tokens that enter it")
        else:
            entering = keep
        checked.append(Stage(layer, keep))
    return tuple(checked)


def _checked_layers(path: str, layers: Sequence[object], num_layers: int, least: int = 0) -> list[int]:
    """Strictly ascending layers before the last one. `path` is the field's name, with {} for the index."""
    room = num_layers - 1 - least
    if len(layers) > room:
        raise ScheduleError(
            f"{path.partition('[')[0]}: {len(layers)} stages, but {num_layers} layers have room for {room} "
            f"(one a layer, none in the last{'' if least == 0 else ', one before the first'})"
        )
    checked: list[int] = []
    for index, value in enumerate(layers):
        field = path.format(index)
        layer = _whole(field, value, least=least)
        if layer > num_layers - 2:
            raise ScheduleError(f"{field}: must be at most {num_layers - 2} with {num_layers} layers, not {layer}")
        if checked and layer <= checked[-1]:
            raise ScheduleError(f"{field}: {layer} does not come after {checked[-1]}, the stage before")
        checked.append(layer)
    return checked


def _checked_keep(path: str, keep: object) -> int | float:
    if isinstance(keep, Real) and not isinstance(keep, Integral):
        share = float(keep)
        if not 0 <= share <= 1:
            raise ScheduleError(f"{path}: a float is a share from 0 to 1, not {share!r}; write a count as an int")
        return share
    return _whole(path, keep, kind="a whole number of tokens or a share from 0.0 to 1.0")


def _fields_of_document(data: Any) -> dict[str, Any]:
    """Constructor arguments from a parsed schedule file; values are left to the constructor's own checks."""
    optional = ("vision_tokens", "nominal", "name")
    told = "provenance"  # how a schedule came about, for people: read by nobody here
    if not isinstance(data, dict):
        raise ScheduleError(f"document: must be a JSON object, not {data!r:.40}")
    if data.get("format", FORMAT) != FORMAT:
        raise ScheduleError(f"format: must be {FORMAT!r}, not {data['format']!r}")
    version = _whole("version", data["version"], least=1) if "version" in data else VERSION
    if version > VERSION:  # before unknown keys: a newer version may well have some
        raise ScheduleError(
            f"version: {version} was written by a newer adaptinfer, this one reads up to {VERSION}; upgrade adaptinfer"
        )
    _check_keys("", data, ("format", "version", "num_layers", "stages"), (*optional, told))
    if not isinstance(data.get(told, {}), dict):
        raise ScheduleError(f"{told}: must be an object, not {data[told]!r:.40}")
    if not isinstance(data["stages"], list):
        raise ScheduleError(f"stages: must be an array, not {data['stages']!r:.40}")
    stages: list[Stage] = []
    for index, entry in enumerate(data["stages"]):
        if not isinstance(entry, dict):
            raise ScheduleError(f"stages[{index}]: must be an object, not {entry!r:.40}")
        _check_keys(f"stages[{index}].", entry, ("layer", "keep"), ())
        stages.append(Stage(**entry))
    rest = {key: data[key] for key in optional if key in data}
    return {"stages": tuple(stages), "num_layers": data["num_layers"], **rest}


def _check_keys(prefix: str, data: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for key in data:
        if key not in required + optional:
            raise ScheduleError(f"{prefix}{key}: unknown key; known are {', '.join(required + optional)}")
    for key in required:
        if key not in data:
            raise ScheduleError(f"{prefix}{key}: missing")


def _solver_layers(
    layers: Sequence[int] | None, num_layers: int, vision_tokens: int, total: Fraction, possible: Sequence[int] | None
) -> list[int]:
    if layers is not None:
        if not isinstance(layers, Sequence) or isinstance(layers, str):
            raise ScheduleError(f"layers: must be a sequence of layer numbers, not {layers!r}")
        return _checked_layers("layers[{}]", list(layers), num_layers)
    depths = [Fraction(depth, 32) for depth in _PUBLISHED_LAYERS]
    return sorted(set(_layers_at(depths, num_layers, total / vision_tokens, possible)))


def _solver_stages_like(
    like: Schedule, num_layers: int, vision_tokens: int, total: Fraction, possible: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Layers and proportions of another schedule's stages; of stages that fall into one layer the last one counts."""
    depths = [Fraction(stage.layer, like.num_layers) for stage in like.stages]
    layers = _layers_at(depths, num_layers, total / vision_tokens, possible)
    merged = dict(zip(layers, like.keeps(like.vision_tokens or 576), strict=bool(layers)))
    return list(merged), list(merged.values())


def _layers_at(
    depths: list[Fraction], num_layers: int, whole_layers: Fraction, possible: Sequence[int] | None
) -> list[int]:
    """Layers at relative depths, ascending. `whole_layers` is how many layers with all tokens the budget would pay."""
    allowed = [layer for layer in range(num_layers - 1) if possible is None or layer in possible]
    if not allowed or not depths:
        return []
    scaled = (_round_half_up(depth * num_layers) for depth in depths)
    first, *later = [min(allowed, key=lambda layer: (abs(layer - depth), layer)) for depth in scaled]
    earliest_enough = math.floor(_MOST_BEFORE_FIRST_STAGE * whole_layers) - 1
    if first > earliest_enough:
        first = max((layer for layer in allowed if layer <= earliest_enough), default=allowed[0])
    return [first, *later]


def _solver_shape(shape: Sequence[int | float] | None, depths: list[int], label: Fraction) -> list[Fraction]:
    """One proportion per stage. A zero becomes next to nothing, so that it can grow once all others are full."""
    if shape is None:
        nearest = min(_PUBLISHED_KEEPS, key=lambda nominal: abs(nominal - label))
        shape = _PUBLISHED_KEEPS[nearest][: len(depths)]
    if len(shape) != len(depths):
        raise ScheduleError(f"shape: {len(depths)} stages (at layers {depths}) need as many numbers, not {len(shape)}")
    proportions: list[Fraction] = []
    for index, value in enumerate(shape):
        exact = _exact(_positive(f"shape[{index}]", value, or_zero=index > 0))
        if proportions and exact > proportions[-1]:
            raise ScheduleError(f"shape[{index}]: {value} is more than {shape[index - 1]}, and keeps never grow")
        proportions.append(exact)
    return [max(value, proportions[0] / 10**9) for value in proportions]


def _ideal_keeps(room: Fraction, spans: list[int], proportions: list[Fraction], most: int) -> list[Fraction]:
    """Fractional keeps in the given proportions, cut at `most`, that fill `room` token-layers exactly."""
    for full in range(len(spans)):  # stages that are cut: the first ones, since proportions never grow
        left = room - most * sum(spans[:full])
        scale = left / sum(p * span for p, span in zip(proportions[full:], spans[full:], strict=True))
        if scale * proportions[full] <= most:
            return [Fraction(most)] * full + [scale * p for p in proportions[full:]]
    raise AssertionError("room is less than `most` in every layer, so some stage is not full")


def _whole_keeps(
    ideal: list[Fraction], spans: list[int], room: Fraction, tolerance: Fraction, most: int
) -> tuple[int, ...]:
    """Whole keeps around `ideal` that never grow: inside the tolerance those nearest to `ideal`, below before above.

    Looks at two values either side of each keep, and carries the nearest way to every total from stage to stage.
    """
    ways = {(0, most): (0.0, ())}  # (token-layers so far, last keep) -> (squared distance to ideal, keeps)
    for wanted, span in zip(ideal, spans, strict=True):
        floor, further = math.floor(wanted), {}
        for (total, last), (distance, keeps) in ways.items():
            for keep in range(max(0, floor - 1), min(last, floor + 2) + 1):
                state, way = (total + keep * span, keep), (distance + (keep - float(wanted)) ** 2, (*keeps, keep))
                further[state] = min(way, further.get(state, way))
        ways = further

    def rank(state: tuple[int, int]) -> tuple[float, float]:
        error, distance = state[0] - room, ways[state][0]
        if abs(error) <= tolerance:
            return (0 if error <= 0 else 1), distance
        return 2 + float(abs(error)), distance

    return ways[min(ways, key=rank)][1]


def _active_width(text: Any) -> int:
    """Width of a mixture of experts that one token goes through, the shared expert included; 0 without experts."""
    experts = next((n for name in _EXPERTS_A_TOKEN if (n := getattr(text, name, None))), 0)
    width = getattr(text, "moe_intermediate_size", None) or 0
    if not isinstance(experts, int) or not isinstance(width, int) or not experts:
        return 0
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return experts * width + (shared or (getattr(text, "n_shared_experts", None) or 0) * width)


def _whole(field: str, value: object, least: int = 0, kind: str = "a whole number") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ScheduleError(f"{field}: must be {kind}, not {value!r}")
    if value < least:
        raise ScheduleError(f"{field}: must be at least {least}, not {value}")
    return int(value)


def _positive(field: str, value: object, or_zero: bool = False) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ScheduleError(f"{field}: must be a finite number, not {value!r}")
    if number < 0 or (number == 0 and not or_zero):
        raise ScheduleError(f"{field}: must be {'at least' if or_zero else 'above'} 0, not {value}")
    return number


def _exact(number: float) -> Fraction:
    """The decimal number that was meant: 0.7 is 7/10, so that halves round the same way everywhere."""
    return Fraction(repr(number))


def _round_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


_EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")
_MOST_BEFORE_FIRST_STAGE = Fraction(3, 4)  # of the budget; 71 % in the published schedule that spends most there
_PUBLISHED_LAYERS = (1, 10, 20)  # of 32
_PUBLISHED_KEEPS = {128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)}  # by label, of 576


def _published() -> dict[str, Schedule]:
    def stages(layers: Sequence[int], keeps: Sequence[float]) -> tuple[Stage, ...]:
        return tuple(map(Stage, layers, keeps))

    schedules: dict[str, Schedule] = {}
    for label, keeps in _PUBLISHED_KEEPS.items():
        name = f"llava-1.5-7b/{label}"
        schedules[name] = Schedule(stages(_PUBLISHED_LAYERS, keeps), 32, 576, label, name)
    for label, keeps in {128: (300, 94, 30), 64: (148, 40, 5)}.items():
        name = f"llava-1.5-13b/{label}"
        schedules[name] = Schedule(
            stages((1, 11, 22), keeps), 40, 576, label, f"{name} (layers inferred, not published)"
        )
    for percent, shares in {50: (0.7, 0.9, 0.3), 30: (0.5, 0.6, 0.3), 10: (0.17, 0.6, 0.3)}.items():
        name = f"qwen2-vl-2b/{percent}"
        schedules[name] = Schedule(stages((0, 9, 19), shares), 28, None, percent / 100, name)
    return schedules


PRESETS: Mapping[str, Schedule] = MappingProxyType(_published())
"""The schedules of arXiv 2508.06084. For LLaVA-1.5-13B only keeps are published: its layers are the ones that fit the
labels best. Qwen2-VL's keeps are shares of the tokens entering a stage, and its labels shares of all vision tokens."""
