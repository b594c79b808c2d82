# pyright: reportMissingImports=false
"""What an engine of vLLM prunes with, read from its finished configuration in whichever process asks."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from adaptinfer.pruners import Pruner
from adaptinfer.serving.settings import pruner_from
from adaptinfer.serving.vllm_plugin.plan import Planner

KEY = "adaptinfer"  # in --additional-config
SCORING = "adaptinfer_scoring_seconds"  # attribute of a model runner's output, on its way to the scheduler


def pruner_of(vllm_config: Any) -> Pruner | None:
    """The pruner of an engine; None if it has none."""
    settings = vllm_config.additional_config
    document = settings.get(KEY) if isinstance(settings, dict) else None
    return None if document is None else pruner_from(document, f"additional_config: {KEY}")


def planner_of(vllm_config: Any) -> Planner:
    """The planner of an engine that prunes."""
    document = json.dumps(vllm_config.additional_config[KEY])
    return _planner(document, vllm_config.model_config.hf_text_config.num_hidden_layers)


@functools.cache
def _planner(document: str, num_layers: int) -> Planner:
    return Planner(pruner_from(document, f"additional_config: {KEY}"), num_layers)


def vision_spans(features: Iterable[Any]) -> list[tuple[int, int]]:
    """Half-open ranges of the prompt's vision tokens, from vLLM's multimodal features."""
    return [
        (start, last + 1)
        for feature in features
        if feature.modality in ("image", "video")
        for start, last in feature.mm_position.extract_embeds_range()
    ]
