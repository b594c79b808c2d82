"""Read the attention of an unpruned model, one sample after the other.

Only the text rows of the attention are computed (T x L, a few heads at a time), inside the layers, by the same code
that scores in a pruned run; the model attends with the backend that it was loaded with. A prompt of 16,000 vision
tokens leaves 4 MB, and nothing else stays in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptinfer.calibration.samples import Sample
from adaptinfer.checkpoints import check_question, processed
from adaptinfer.engine.families import family_of, placeholders_of
from adaptinfer.engine.handle import Handle
from adaptinfer.errors import InputError, UnsupportedError
from adaptinfer.pruners.contracts import Capabilities, Pruner
from adaptinfer.pruners.views import StageView
from adaptinfer.schedule import ModelShape, Schedule

_SAMPLED_VALUES = 64  # of each parameter, in a model's fingerprint


@dataclass(frozen=True, eq=False)
class Reading:
    """What one sample showed.

    Attributes:
        index: the sample's number in its source.
        id: its name.
        kind: its kind of question.
        mass: float32 [L, V], attention that a guiding text token pays to each vision token, mean over heads and guiding
            tokens. A row of zeros where a layer has no keys of its own.
        score: float32 [L, V], what the method thinks of each vision token in each layer, likewise.
        text_tokens: the prompt's other tokens.
    """

    index: int
    id: str
    kind: str
    mass: np.ndarray
    score: np.ndarray
    text_tokens: int

    @property
    def vision_tokens(self) -> int:
        """V."""
        return self.mass.shape[1]


@dataclass(frozen=True)
class _Observer(Pruner):
    """Scores as a method does in every layer, and writes down what it saw."""

    name: ClassVar[str] = "observer"
    reference: ClassVar[str] = "calibration"

    method: Pruner | None = None
    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list, compare=False)

    @property
    def capabilities(self) -> Capabilities:
        all_heads = "" if self.method is None else self.method.capabilities.all_heads
        return Capabilities(observes=True, all_heads=all_heads)

    def score(self, view: StageView) -> Tensor:
        assert self.method is not None
        score = self.method.score(view)
        paid = torch.stack([part.text_to_vision.sum(dim=(1, 2)) for part in view.by_heads()]).sum(dim=0)
        self.seen.append((view.layer, view.total(paid) / (view.all_heads * view.text_index.shape[1]), score.float()))
        return score


class Reader:
    """Reads one model; a context manager, which leaves the model as it was.

    Args:
        model: loaded, without a pruner.
        processor: the one that belongs to it.
        method: whose scores are recorded; its budget and schedule do not matter.

    Raises:
        UnsupportedError: pruning does not fit the model, or the method has no score to record.
        AdaptInferError: a pruner is attached already.
    """

    def __init__(self, model: Any, processor: Any, method: Pruner) -> None:
        check_method(method)
        self.model, self.method, self._processor = model, method, processor
        self.shape = ModelShape.from_config(model.config)
        self.scoring = family_of(model).scoring
        self._observer = _Observer(schedule=Schedule((), self.shape.num_layers), method=method)
        self._handle = Handle(model, self._observer, early_drop=False)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.detach()

    def read(self, index: int, sample: Sample) -> Reading:
        """Run one prefill, by itself, so that the reading does not depend on what else is read.

        Raises:
            InputError: the model's processor refuses the sample, or no text follows its last image.
        """
        inputs = self._inputs(sample)
        seen = self._observer.seen
        seen.clear()
        with torch.inference_mode():
            self.model.base_model(**inputs, use_cache=False)
        if not seen:
            raise InputError(f"{sample.id}: no text after the last image, so nothing tells which vision tokens matter")
        vision = seen[0][1].shape[1]
        mass, score = np.zeros((2, self.shape.num_layers, vision), dtype=np.float32)
        for layer, paid, scored in seen:
            mass[layer], score[layer] = paid[0].cpu().numpy(), scored[0].cpu().numpy()
        seen.clear()
        return Reading(index, sample.id, sample.kind, mass, score, inputs["input_ids"].shape[1] - vision)

    def tokens(self, sample: Sample) -> tuple[int, int]:
        """Vision tokens and others of a sample's prompt, by the processor alone. Raises InputError as `read` does."""
        ids = self._inputs(sample)["input_ids"]
        vision = sum(int((ids == token).sum()) for token in placeholders_of(self.model.config))
        return vision, ids.shape[1] - vision

    def _inputs(self, sample: Sample) -> dict[str, Any]:
        try:
            question = check_question(sample.question)
        except InputError as error:
            raise InputError(f"{sample.id}: {error}") from None
        for attribute in ("image_token", "video_token"):
            token = getattr(self._processor, attribute, None)
            if token and token in question:
                raise InputError(f"{sample.id}: the question holds {token!r}, which stands for a picture in this model")
        try:
            inputs = dict(processed(self._processor, list(sample.images), question))
        except Exception as error:  # a foreign processor may break over a sample in any way; it costs this sample
            raise InputError(f"{sample.id}: the model's processor refuses it ({error})") from None
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }


def check_method(method: Pruner) -> None:
    """Refuse a method whose choice is no ranking by a score of a layer's own. Raises UnsupportedError."""
    if type(method).score is Pruner.score or set(method.capabilities.needs) - {"next"}:
        raise UnsupportedError(
            f"method: {type(method).__name__} does not rank tokens by a score that each layer can tell by itself, so "
            "there is nothing to record; calibrate with AdaptInfer or another method that scores"
        )


def fingerprint(model: Any) -> str:
    """A digest of a model's sizes and of some values of every parameter: of another model or training it is another.

    Parameters that are offloaded count by name and shape alone.
    """
    digest = hashlib.sha256(repr(ModelShape.from_config(model.config)).encode())
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            values = parameter.detach().reshape(-1)
            picked = values[:: max(1, values.numel() // _SAMPLED_VALUES)]
            digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def describe_method(method: Pruner) -> dict[str, Any]:
    """Name and settings of the method whose scores are recorded."""
    chosen = {each.name: getattr(method, each.name) for each in dataclasses.fields(method)}
    settings = {name: value for name, value in chosen.items() if name not in ("budget", "schedule", "positions")}
    return {"name": method.name, **json.loads(json.dumps(settings))}
