"""Where vision tokens are dropped and how many remain, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from adaptinfer.files import write_whole
from adaptinfer.schedule.checks import ScheduleError, exact, positive, round_half_up, whole
from adaptinfer.schedule.cost import ModelShape

FORMAT = "adaptinfer.schedule"
VERSION = 1
BEFORE = -1
"""The layer of a stage that acts before the language model: layer 0 is given what it keeps."""


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
class Schedule:
    """Stages for a model with `num_layers` decoder layers. Without stages nothing is pruned.

    `vision_tokens` is the count that int keeps are meant for (576 for LLaVA-1.5): a prompt with another number of
    vision tokens gets them scaled in proportion. None takes int keeps literally. `nominal` is the label in the paper
    (tokens, or a share if below 1), `name` is free text; neither changes anything.

    Methods take `vision_tokens`, the number in the prompt; None stands for the schedule's own.

    Raises ScheduleError for stages that are out of order or in the last layer (no layer would read what it keeps),
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

        normalise("num_layers", whole("num_layers", self.num_layers, least=1))
        if self.vision_tokens is not None:
            normalise("vision_tokens", whole("vision_tokens", self.vision_tokens, least=1))
        if self.nominal is not None:
            normalise("nominal", positive("nominal", self.nominal))
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
                kept = round_half_up(exact(stage.keep) * entering)
            elif self.vision_tokens is not None:
                kept = min(entering, round_half_up(Fraction(stage.keep * prompt, self.vision_tokens)))
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
        text = whole("text_tokens", text_tokens)
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
        tokens = sum(self.tokens_per_layer(vision_tokens)) + self.num_layers * whole("text_tokens", text_tokens)
        per_token = 2 * shape.num_kv_heads * shape.head_dim * whole("bytes_per_value", bytes_per_value, least=1)
        return whole("batch", batch, least=1) * tokens * per_token

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
            raise ScheduleError("vision_tokens: the schedule has no count; give the number in the prompt")
        return whole("vision_tokens", self.vision_tokens if vision_tokens is None else vision_tokens)


def _checked_stages(stages: object, num_layers: int, vision_tokens: int | None) -> tuple[Stage, ...]:
    """The stages with plain ints and floats in them, once they are known to make sense."""
    if not isinstance(stages, (tuple, list)):
        raise ScheduleError(f"stages: must be a tuple of Stage, not {stages!r}")
    for index, stage in enumerate(stages):
        if not isinstance(stage, Stage):
            raise ScheduleError(f"stages[{index}]: must be a Stage, not {stage!r}")
    layers = checked_layers("stages[{}].layer", [stage.layer for stage in stages], num_layers, least=BEFORE)
    checked: list[Stage] = []
    entering = vision_tokens  # None while it depends on the prompt
    for index, (layer, stage) in enumerate(zip(layers, stages, strict=True)):
        keep = _checked_keep(f"stages[{index}].keep", stage.keep)
        if isinstance(keep, float):
            entering = None if entering is None else round_half_up(exact(keep) * entering)
        elif entering is not None and keep > entering:
            raise ScheduleError(f"stages[{index}].keep: {keep} is more than the {entering} vision tokens that enter it")
        else:
            entering = keep
        checked.append(Stage(layer, keep))
    return tuple(checked)


def checked_layers(path: str, layers: Sequence[object], num_layers: int, least: int = 0) -> list[int]:
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
        layer = whole(field, value, least=least)
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
    return whole(path, keep, kind="a whole number of tokens or a share from 0.0 to 1.0")


def _fields_of_document(data: Any) -> dict[str, Any]:
    """Constructor arguments from a parsed schedule file; values are left to the constructor's own checks."""
    optional = ("vision_tokens", "nominal", "name")
    told = "provenance"  # how a schedule came about; for people, not read here
    if not isinstance(data, dict):
        raise ScheduleError(f"document: must be a JSON object, not {data!r:.40}")
    if data.get("format", FORMAT) != FORMAT:
        raise ScheduleError(f"format: must be {FORMAT!r}, not {data['format']!r}")
    version = whole("version", data["version"], least=1) if "version" in data else VERSION
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
